"""The nouns every room shares: examples, encoded samples, batches, losses.

Only plain records live here (and how text of others is shown); no I/O, no model code, no settings. A record crosses
rooms, so each field states its shape and unit. Letters: B rows, T positions, K supervised tokens, M images, N visual
tokens per image, P patches per image, Dv tower width, Dh language-model width.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # the command line imports this file and must answer --help without loading torch
    import numpy as np
    import torch
    from PIL import Image


class UserError(ValueError):
    """The user's input is wrong. The message says what was wrong, what was expected, and what to do.

    The command line prints it without a traceback; a notebook sees an ordinary ``ValueError``.
    """


class ProcessError(RuntimeError):
    """A process that this one leans on, of its job or one that loads data, failed, hangs or was killed.

    No wrong input, and no bug of this process: the command line prints it without a traceback and ends as after a
    crash.
    """


class ConfigNote(UserWarning):
    """A config means what it says, and its author may want to know this of it."""


class Status(StrEnum):
    """How a run ended, honestly: a crash is never ``cancelled``."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED_BY_GUARDRAIL = "stopped_by_guardrail"
    CANCELLED = "cancelled"


DatasetKind = Literal[
    "auto", "jsonl", "llava_pretrain", "llava_instruct", "sharegpt", "vqa", "gqa", "webdataset", "parquet"
]
"""What a record file is; here, where the command line can read it without loading the settings.

auto: recognised by looking. The others hold a file to one container, and some to one shape: jsonl: a record a line.
llava_pretrain, llava_instruct: one JSON array of conversations. sharegpt: the same, or a record a line. vqa: VQA-v2's
or OK-VQA's question file, with its annotation file. gqa: GQA's question file. webdataset: tar shards. parquet: rows.
"""

ShapeName = Literal["caption", "turns", "parts", "texts", "query", "instruction", "question", "statement"]
"""What a record says: a row each of `data.formats.SHAPES`."""


def printable(text: str, *, one_line: bool = False) -> str:
    """``text`` without power over a terminal or a page: control, format and direction characters as JSON escapes.

    Newlines and tabs are kept unless it has to stay on ``one_line``. It may be given in pieces; JSON stays the same
    JSON.
    """
    if text.isprintable():
        return text
    kept = "\N{ZERO WIDTH JOINER}" if one_line else "\n\t\N{ZERO WIDTH JOINER}"  # the joiner holds emoji together
    return "".join(
        _json_escape(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in kept else c
        for c in text
    )


def _json_escape(c: str) -> str:
    units = c.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[k : k + 4]}" for k in range(0, len(units), 4))


Condition = Literal["correct", "shuffled", "zero", "noise", "none"]
"""Which image the model was shown: its own, another sample's, one whose normalised pixels are 0, one whose normalised
pixels are drawn from N(0, 1), or none at all: the same text without the image's place."""

CONDITIONS: tuple[Condition, ...] = ("correct", "shuffled", "zero", "noise")
"""Under which losses are compared, in the order they are told. ``none`` is for answers that the model writes."""


# ---------------------------------------------------------------------------------------------------------------
# Data: what a source yields


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of one image are. Opening it is `data.images`' business and nobody else's."""

    root: str
    """Folder the image must lie in after every symlink is resolved; or the file that holds its bytes."""
    path: str
    """Path below ``root`` as the record spells it; or the member name inside a shard, or a label."""
    kind: Literal["file", "tar", "parquet", "arrow", "inline"] = "file"
    offset: int = 0
    """tar: byte offset of the member's data. parquet, arrow: row number. inline: byte offset of the record's JSON."""
    size: int = 0
    """tar, inline: bytes. Otherwise unused."""
    item: int = 0
    """parquet, arrow: which of the bytes in the cell. inline: which of the record's ``data:`` URIs."""
    column: str = ""
    """parquet, arrow: the cell's column."""
    more_roots: tuple[str, ...] = ()
    """file: further folders it may lie in, through a symlink or by an absolute path."""

    def __str__(self) -> str:
        return f"{self.root}/{self.path}" if self.kind == "file" else f"{self.root}!{self.path}"


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place in a conversation where image number ``index`` (0-based) of the example goes."""

    index: int


Part = str | ImageSlot
"""One piece of a turn: literal text (never interpreted) or an image slot."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. Text parts are literal: a ``<image>`` typed inside one stays text (S1-3)."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn as a person reads it, slots shown as ``<image>``."""
        return "".join(p if isinstance(p, str) else "<image>" for p in self.parts)


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation sample, before any tokenizer has seen it."""

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    source: str = ""
    file: str = ""
    """File the record came from, for error messages."""
    row: int = 0
    """0-based record number in ``file``."""
    answers: tuple[str, ...] = ()
    """Reference answers of a question, as several people gave them (VQA has ten); empty: the last turn alone."""
    question_type: str = ""
    """Kind of question as the data set names it, such as "what color"; empty: told from the words."""
    answer_type: str = ""
    """Kind of answer as the data set names it (VQA: yes/no, number, other); empty: told from the words."""

    @property
    def target_text(self) -> str:
        """What the assistant says, all turns joined by newlines: everything that is learned."""
        return "\n".join(t.text for t in self.turns if t.role == "assistant")

    @property
    def num_answers(self) -> int:
        """Turns of the assistant."""
        return sum(t.role == "assistant" for t in self.turns)

    @property
    def answer_text(self) -> str:
        """The assistant's last turn, which is what a prompt (`ChatEncoder.encode_prompt`) asks the model for.

        Empty when nobody has answered yet: no assistant turn, or the user has the last word.
        """
        last = self.turns[-1] if self.turns else None
        return last.text if last is not None and last.role == "assistant" else ""

    @property
    def where(self) -> str:
        """``file:record N (id …)``, the way every data error names a sample."""
        return f"{self.file}: record {self.row} (id {self.id!r})"


# ---------------------------------------------------------------------------------------------------------------
# Encoding: what the one encoder yields


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as token ids with the supervision mask and image spans that were built with them."""

    ids: np.ndarray
    """int64 [T]"""
    supervise: np.ndarray
    """bool [T]: True where the token itself is a target."""
    image_spans: tuple[tuple[int, int], ...]
    """``[start, stop)`` of the N reserved positions of image k, in image order."""
    truncated: bool = False
    image_sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) that each image was laid out for, where its reserved positions depend on it (native models)."""
    image_positions: tuple[np.ndarray, ...] | None = None
    """int64: reserved positions of each image where its span holds other tokens too (marks between tiles); None: all of
    the span is reserved."""

    def reserved(self, k: int) -> np.ndarray:
        """int64: the positions of image ``k``."""
        import numpy as np

        return np.arange(*self.image_spans[k]) if self.image_positions is None else self.image_positions[k]

    @property
    def num_targets(self) -> int:
        return int(self.supervise.sum())


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """What the tower wants to see and what it gives back: all that `data` may know of `model`."""

    height: int
    width: int
    num_patches: int
    d_vision: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["stretch", "shortest_edge"] = "stretch"
    """stretch: straight to height x width. shortest_edge: resize the short side to ``resize_to``, then centre crop."""
    resize_to: int = 0
    """Short side in pixels before the crop (``shortest_edge`` only)."""
    resample: Literal["bilinear", "bicubic", "lanczos", "nearest"] = "bicubic"


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image as the loader hands it over: stored tower features, or pixels for the tower."""

    features: torch.Tensor | None = None
    """From the feature store, or None: bf16 [P, Dv], of a tower that learns what goes into its lowest block that
    does; of a native model, in its own precision, [tokens, 1 + layers, Dh]: what its language model is given for the
    image, and what its first layers add to it (deepstack)."""
    pixels: torch.Tensor | None = None
    """uint8 [3, H, W], resized and cropped but not yet normalised, or None."""
    inputs: Mapping[str, torch.Tensor] | None = None
    """What a native model's own processor makes of it, or None."""
    size: tuple[int, int] | None = None
    """(height, width) before that."""
    blank: tuple[Literal["zero", "noise"], int] | None = None
    """An image without anything in it, of the size that its place was laid out for: normalised pixels 0, or drawn from
    N(0, 1) with this seed (native models); or None."""


class ImageProcessor(Protocol):
    """How a native model's own processor takes images: what `data` knows of it (`model.processor`)."""

    fingerprint: str
    """sha256 over everything that decides which inputs the same pixels give."""
    token_id: int
    """What stands at reserved positions."""
    placeholder: str
    """What the chat template writes where an image goes."""
    chat_template: str
    most_images: int | None
    """Of a sample; None: no bound."""

    def process(self, image: Image.Image, /) -> ImageInput:
        """The inputs of an RGB image."""
        ...

    def place(self, size: tuple[int, int], /) -> str:
        """What stands in the text for an image of this (height, width), instead of the placeholder."""
        ...


@dataclass(slots=True)
class Batch:
    """Samples laid out in rows. A padded batch is a packed batch with one sample per row: the same fields.

    Every sample's ``position_ids`` start at 0, padding forms a sample of its own with ``sample_index`` -1, and no
    attention mask is needed: attention never crosses a restart of the positions (`model.language`).
    """

    input_ids: torch.Tensor
    """int64 [B, T]"""
    position_ids: torch.Tensor
    """int64 [B, T], restarting at 0 at each sample and at the padding."""
    supervise: torch.Tensor
    """bool [B, T]"""
    sample_index: torch.Tensor
    """int64 [B, T]: index into ``ids``, -1 at padding."""
    image_positions: torch.Tensor
    """int64 [S], S the visual tokens of all images: flat position ``row * T + t`` of each reserved slot, image after
    image."""
    image_lengths: torch.Tensor
    """int64 [M]: visual tokens of each image, which may differ."""
    image_sample: torch.Tensor
    """int64 [M]: index into ``ids`` of the sample that owns the image."""
    images: list[ImageInput]
    """M inputs, in the order of ``image_lengths``."""
    ids: list[str]
    """Sample ids."""
    truncated: int = 0
    """How many of the samples were cut to the maximum length."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """(sample id, reason) of samples that were asked for and could not be had, policy ``skip``."""
    load_s: float = 0.0
    """Seconds of a worker's time spent on building this batch."""
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    """`Encoded.image_sizes` of the images, M or none."""
    step: int = 0
    """Optimizer steps that were done before it."""
    taught: list[Taught] = field(default_factory=list)
    """What each teacher says of the supervised tokens, those of sample 0 first."""

    @property
    def num_targets(self) -> int:
        """Supervised tokens: what the loss sum is divided by, once, over the whole effective batch."""
        return int(self.supervise.sum())

    @property
    def num_tokens(self) -> int:
        """Positions that belong to a sample (padding excluded)."""
        return int((self.sample_index >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, without what teachers say of it, which no model reads; copies are asynchronous where
        the memory is pinned."""
        if device.type == "cpu":
            return self

        return replace(self, taught=[])._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by ``DataLoader(pin_memory=True)``."""
        return self._each(lambda t: t.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        names = (
            "input_ids", "position_ids", "supervise", "sample_index", "image_positions", "image_lengths",
            "image_sample",
        )  # fmt: skip
        images = [
            replace(
                image,
                features=None if image.features is None else change(image.features),
                pixels=None if image.pixels is None else change(image.pixels),
                inputs=None if image.inputs is None else {k: change(t) for k, t in image.inputs.items()},
            )
            for image in self.images
        ]
        taught = [
            own._each(change) if isinstance(own, Batch) else {k: change(t) for k, t in own.items()}
            for own in self.taught
        ]
        return replace(self, images=images, taught=taught, **{name: change(getattr(self, name)) for name in names})


Taught = Mapping[str, "torch.Tensor"] | Batch
"""What a teacher says of a batch's supervised tokens: its rows as they are stored, by column, [K, …]; or, of one that
is asked while the student learns, the same samples in the same order as it takes them itself."""


# ---------------------------------------------------------------------------------------------------------------
# What was learned


@dataclass(frozen=True, slots=True)
class TrainedPart:
    """What one part of a model has learned, as a checkpoint keeps it."""

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    """What it was made for, and what others must know to compute with it."""


# ---------------------------------------------------------------------------------------------------------------
# Losses: sums and counts, never means


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss as a sum and what it is to be divided by, so that whoever knows the whole batch divides once."""

    total: torch.Tensor
    """Scalar, fp32, nats summed over supervised tokens; carries the graph."""
    tokens: int
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What it is made of, for the log, by name: sums over the same tokens, without the graph. The same names whatever
    the batch."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Weights of the parts at this step, for the log."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Negative log-likelihood of every supervised token of a batch."""

    nll: torch.Tensor
    """fp32 [K], nats."""
    sample: torch.Tensor
    """int64 [K]: index into ``Batch.ids``."""
    correct: torch.Tensor | None
    """bool [K]: the token was the arg-max. None while gradients are recorded: training has no use for it."""


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a model makes of the supervised tokens of a batch, before its head: in the order in which they stand in it,
    row after row."""

    hidden: torch.Tensor
    """[K, Dh]: final hidden states that predict them; carries the graph."""
    targets: torch.Tensor
    """int64 [K]: their ids."""
    sample: torch.Tensor
    """int64 [K]: index into ``Batch.ids``."""


@runtime_checkable
class LayerKeeper(Protocol):
    """Keeps what goes into a layer of the language model. Implemented by `store.layers.LayerStore`."""

    def read(self, key: bytes, length: int, /) -> torch.Tensor | None: ...
    def put(self, key: bytes, hidden: torch.Tensor, /) -> None: ...


class TeacherReader(Protocol):
    """Looks up what a teacher says of a sample. Implemented by `store.teachers.TeacherCache`; `data` only sees this."""

    def taught(self, examples: Sequence[Example], targets: Sequence[np.ndarray]) -> Mapping[str, torch.Tensor]:
        """The rows of all samples' supervised tokens (``targets``, their ids), one sample after another, by column.

        Raises `UserError` for samples of which there are none, naming them.
        """
        ...


class FeatureReader(Protocol):
    """Looks up stored tower features. Implemented by `store.features.FeatureStore`; `data` only sees this."""

    def read(self, ref: ImageRef) -> torch.Tensor | None:
        """`ImageInput.features`, or None when the image is not stored."""
        ...
