"""The door to outside language models: any Hugging Face causal LM, from a hub name, a folder, or a GGUF file.

Splits a causal LM into embed, decoder and head, so that the head runs on supervised positions only, and proves at load
time that the split computes what the model itself computes. Templates and token ids are `data.chat`'s business.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor, nn

from beholder.config import GenerateConfig, LlmConfig, VisionConfig
from beholder.model import attention
from beholder.model.families import (
    check_no_adapter,
    check_soft_cap,
    kernel_at_hand,
    limits_of,
    running,
)
from beholder.model.placement import decoder_of, given_to, input_of, language_part, state_below
from beholder.model.weights import (
    DTYPES,
    check_depth,
    check_finite,
    check_loading_info,
    check_no_pointer,
    check_stated,
    computed_in,
    first_line,
    freeze,
    from_pretrained,
    hash_state,
    loading,
)
from beholder.types import UserError


def _pass_by(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


_DRAWS = threading.Lock()


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn depends on ``seed`` alone. transformers draws from the one state that the process has, so two
    threads that write answers at once wait for each other."""
    with _DRAWS, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class LanguageModel(nn.Module):
    """A causal LM used from embeddings: with frozen weights, with or without adapters (`model.adapters`), in its
    storage precision, without autocast; or, where it was made for the run (`model.student`), with fp32 weights and
    under autocast in ``compute_dtype``. It has no dropout either way.

    ``d_text`` is the width of its embeddings, ``vocab`` the rows of its table, ``embed_rms`` the RMS of the table.
    ``whole``: ``model`` is a whole vision-language model, of which only the decoder and the head are parts of this one.
    """

    def __init__(
        self, model: nn.Module, name: str, gradient_checkpointing: bool = False, *, whole: bool = False
    ) -> None:
        super().__init__()
        self.model: Any
        if whole:  # at hand under its own names (adapters' are below it), but its tower is no part of this module
            self.__dict__["model"] = model
            self.text, self.output = self.decoder, self.model.get_output_embeddings()
        else:
            self.model = model
        self.name = name
        self.config = self.model.config.get_text_config()
        self.decoder_checkpointing = gradient_checkpointing
        self.part = language_part(model, name, whole=whole)
        self.part.try_out = self.try_out
        freeze(self)
        self.computed_in = computed_in(self.decoder)
        if gradient_checkpointing:
            self._enable_checkpointing("model.native" if whole else "model.llm")
        table = self.model.get_input_embeddings()
        self.vocab, self.d_text = table.weight.shape
        self.limits = limits_of(self.decoder if whole else model)
        self.embed_rms = self._embed_rms()
        self.packing_error: str | None = None
        self.compute_dtype: torch.dtype | None = None
        """What it is computed in where that is not its storage precision."""
        self.segmented = self.model.config._attn_implementation == attention.NAME

    computed_in: str
    """Types of the buffers that its decoder computes itself, such as rotary frequencies."""

    # Held outside of the module tree so that the parts are not registered twice.
    @property
    def decoder(self) -> nn.Module:
        return decoder_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def attention(self) -> str:
        """Attention in use, as transformers names it, or our own."""
        return self.model.config._attn_implementation

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stays in eval mode: dropout in a frozen model is noise. Only its adapters follow ``mode``, their dropouts and
        their strength. With gradient checkpointing, the checkpointing wrappers (and nothing inside them) are told that
        training goes on, which is what they look at."""
        super().train(False)
        self.part.learn(mode)
        if self.decoder_checkpointing:
            for layer in self._checkpointed_layers():
                layer.training = mode
        return self

    def _computing(self) -> AbstractContextManager[Any]:
        other = self.compute_dtype not in (None, self.dtype)
        return torch.autocast(self.device.type, dtype=self.compute_dtype if other else None, enabled=other)

    def _checkpointed_layers(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [m for m in self.modules() if isinstance(m, GradientCheckpointingLayer)]

    def _enable_checkpointing(self, section: str) -> None:
        layers = self._checkpointed_layers()
        if not layers:
            raise UserError(
                f"{section}.gradient_checkpointing: {self.name} ({type(self.model).__name__}) does not support it"
            )
        how = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        for layer in layers:
            for knob in ("dropout", "activation_dropout", "resid_dropout"):
                if isinstance(getattr(layer, knob, None), float):
                    setattr(layer, knob, 0.0)

    @torch.no_grad()
    def _embed_rms(self, rows: int = 8192) -> float:
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for start in range(0, self.vocab, rows):
            ids = torch.arange(start, min(start + rows, self.vocab), device=self.device)
            total += self.embed(ids[None]).float().square().sum(dtype=torch.float64)
            count += ids.numel() * self.d_text
        return float((total / count).sqrt())

    def embed(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t dh"]:
        """Rows of the table (scaled where the family scales them inside its embedding module)."""
        table = self.model.get_input_embeddings()
        with torch.set_grad_enabled(torch.is_grad_enabled() and table.weight.requires_grad):
            return table(ids)

    @property
    def head_learns(self) -> bool:
        """Whether weights of its head do, a table of embeddings that is the head among them."""
        return any(p.requires_grad for p in self.model.get_output_embeddings().parameters())

    def hidden(
        self,
        inputs_embeds: Float[Tensor, "b t dh"],
        position_ids: Int[Tensor, "b t"],
        beside: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "b t dh"]:
        """Final hidden states, causal within each run of positions that starts at 0, blind across runs.

        No attention mask is passed: transformers builds the block-diagonal one from the restarts. ``beside``: what a
        native model's decoder takes besides, or instead (`model.native`).
        """
        extra = {"segments": attention.find_segments(position_ids)} if self.segmented else {}
        given = {"position_ids": position_ids, "attention_mask": None, **extra, **(beside or {})}
        with self._computing():
            out = self.decoder(inputs_embeds=inputs_embeds.to(self.dtype), use_cache=False, **given)
        return out.last_hidden_state

    @property
    def lowest(self) -> str | None:
        """The lowest of its layers that learns, where it is not the first: what goes into it can be kept of every
        sample, as long as its embeddings do not change."""
        lowest = self.part.lowest
        return None if lowest is None or lowest == self.part.blocks[0] else lowest

    @torch.no_grad()
    def keep(self, inputs_embeds: Float[Tensor, "b t dh"], position_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t dh"]:
        """What goes into the lowest layer that learns; `finish` goes on from it."""
        assert self.lowest is not None
        return input_of(self.part, self.lowest, lambda: self.hidden(inputs_embeds, position_ids))

    def finish(self, kept: Float[Tensor, "b t dh"], position_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t dh"]:
        """`hidden` from what `keep` gave; the layers below are passed by."""
        assert self.lowest is not None
        below = [self.part.module.get_submodule(b) for b in self.part.blocks[: self.part.blocks.index(self.lowest)]]
        try:
            for layer in below:
                layer.forward = _pass_by
            with given_to(self.part, self.lowest, kept):
                return self.hidden(kept, position_ids)
        finally:
            for layer in below:
                del layer.forward

    @torch.no_grad()
    def check_kept(self) -> str | None:
        """Why nothing can be kept, or None where `finish` after `keep` gives what `hidden` does."""
        if self.lowest is None:
            return "it learns from its first layer on"
        if self.decoder_checkpointing:
            return "the backward pass runs its layers again, without what was kept (model.llm.gradient_checkpointing)"
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab, (2, 9), generator=draw).to(self.device)
        positions = torch.tensor([[*range(5), *range(4)], [*range(9)]], device=self.device)
        try:
            whole = self.hidden(self.embed(ids), positions)
            again = self.finish(self.keep(self.embed(ids), positions), positions)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, StopIteration) as e:
            return f"it cannot go on from {self.lowest} ({first_line(e)})"
        return None if torch.equal(whole, again) else f"going on from {self.lowest} gives something else"

    def below_fingerprint(self) -> str:
        """sha256 over the weights that decide what `keep` gives, and how it is computed."""
        assert self.lowest is not None
        how = f"{self.config.to_json_string()} {self.dtype} {self.computed_in} {self.attention} below {self.lowest}"
        return hash_state(state_below(self.part, self.lowest), how)

    def try_out(self) -> None:
        """One forward pass over a few tokens."""
        ids = torch.arange(8, device=self.device)[None]
        self.hidden(self.embed(ids), torch.arange(8, device=self.device)[None])

    def head(self, hidden: Float[Tensor, "k dh"]) -> Float[Tensor, "k v"]:
        """Logits, with the scaling or soft cap that the family applies after its output matrix."""
        with self._computing():
            logits = self.model.get_output_embeddings()(hidden.to(self.dtype))
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(self.config, "logit_scale", None)) is not None:
            logits = logits * factor
        cap = getattr(self.config, "final_logit_softcapping", None) or getattr(self.config, "logits_soft_cap", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    @torch.no_grad()
    def generate(
        self, prompts: list[Tensor], how: GenerateConfig, *, eos_ids: list[int], seed: int = 0, streamer: Any = None
    ) -> list[list[int]]:
        """New token ids for each prompt given as embeddings ``[T_i, Dh]``, up to and with the end token.

        One left-padded batch. Temperature 0 is greedy, and then (in fp32) independent of what else is in the batch.
        Sampling depends on ``seed`` and the batch, and leaves the global random state alone. ``streamer``
        (transformers' ``put(ids)`` and ``end()``) gets each token as it comes; what it raises ends the writing. A model
        with a table of positions writes to its end and no further. Raises `UserError` for a prompt that fills it.
        """
        longest = max(p.shape[0] for p in prompts)
        room = how.max_new_tokens
        table = self.limits.positions
        if table is not None and longest + room - 1 > table:  # the last one written is not read again
            if len(prompts) > 1:  # each to its own end of the table
                return [self.generate([p], how, eos_ids=eos_ids, seed=seed, streamer=streamer)[0] for p in prompts]
            room = table - longest + 1
            if room < 1:
                raise UserError(
                    f"the prompt takes {longest} positions and {self.name} has a table of {table}, so there "
                    "is no room for an answer; use a shorter prompt, or fewer images or visual tokens"
                )
        embeds = prompts[0].new_zeros(len(prompts), longest, self.d_text, dtype=self.dtype)
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=embeds.device)
        for row, prompt in enumerate(prompts):
            embeds[row, longest - prompt.shape[0] :] = prompt.to(self.dtype)
            mask[row, longest - prompt.shape[0] :] = 1
        return self.write(
            {"inputs_embeds": embeds, "attention_mask": mask}, 0, how.model_copy(update={"max_new_tokens": room}),
            eos_ids=eos_ids, seed=seed, streamer=streamer,
        )  # fmt: skip

    @torch.no_grad()
    def write(
        self, given: Mapping[str, Any], prompt: int, how: GenerateConfig, *, eos_ids: list[int], seed: int = 0,
        streamer: Any = None,
    ) -> list[list[int]]:  # fmt: skip
        """New token ids of each row of ``given``, what the model's own ``generate`` takes; its rows repeat ``prompt``
        tokens first."""
        from transformers import GenerationConfig

        greedy = how.temperature < 1e-4  # below it the softmax overflows, and only one token is left anyway
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if not greedy:
            sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=how.max_new_tokens, repetition_penalty=how.repetition_penalty, eos_token_id=eos_ids,
            pad_token_id=eos_ids[0], use_cache=True, num_beams=1, **sampling,
        )  # fmt: skip
        learning = self.part.learning
        self.train(False)  # no dropout; and a checkpointing layer in training mode drops the key/value cache
        try:
            with nullcontext() if greedy else _drawing(seed, self.device), self._computing():
                new = self.model.generate(**given, generation_config=settings, streamer=streamer)[:, prompt:]
        finally:
            self.train(learning)
        ends = set(eos_ids)
        out: list[list[int]] = []
        for row in new.tolist():
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            out.append(row[:stop])
        return out

    @torch.no_grad()
    def check_head(self) -> None:
        """Refuse a family whose logits are not ``head(hidden(embed(ids)))``: its loss would be another model's."""
        ids = self._probe_ids(12)
        positions = torch.arange(12, device=self.device)[None]
        segmented, self.segmented = self.segmented, False  # the same attention on both sides: this is about the split
        ours = self.head(self.hidden(self.embed(ids), positions)[0]).float()
        self.segmented = segmented
        theirs = self.model(input_ids=ids, use_cache=False).logits[0].float()
        # Same operations in the same order: equal up to kernel choice. bf16 keeps 8 bits. A missing soft cap, scale or
        # norm is off by the order of 1 wherever it matters.
        tolerance = 1e-5 if self.dtype == torch.float32 else 1e-2
        error = float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1e-6))
        if not error <= tolerance:
            raise UserError(
                f"{self.name} ({type(self.model).__name__}): logits from the split model differ from its own by "
                f"{error:.1e} of their size (allowed {tolerance:.0e}); the family does something after its decoder or "
                "head that is not supported"
            )

    @torch.no_grad()
    def check_packing(self) -> None:
        """Find out whether restarting positions keep packed samples apart, for the attention in use.

        Sets ``packing_error`` (None when they do). The second sample of a packed row must not change when the first one
        is swapped, and must be what it is alone.
        """
        a, a2, b = (self._probe_ids(7, seed=s) for s in (1, 2, 3))
        positions = torch.arange(7, device=self.device)[None]
        packed = torch.cat([positions, positions], 1)
        after_a = self.hidden(self.embed(torch.cat([a, b], 1)), packed)[0, 7:].float()
        after_a2 = self.hidden(self.embed(torch.cat([a2, b], 1)), packed)[0, 7:].float()
        alone = self.hidden(self.embed(b), positions)[0].float()
        size = alone.square().mean().sqrt()
        leak = float((after_a - after_a2).square().mean().sqrt() / size)
        drift = float((after_a - alone).square().mean().sqrt() / size)
        # Without a leak the first number is 0 up to kernel order; the second sees other shapes, hence other rounding.
        allowed = 1e-4 if self.dtype == torch.float32 else 5e-2
        if not (leak <= min(allowed, 1e-3) and drift <= allowed):
            self.packing_error = (
                f"{self.name} with attention {self.attention}: packed samples are not "
                f"independent (swapping the first changes the second by {leak:.1e}, packing by {drift:.1e} of its "
                "size). Set train.packing: false, or another model.llm.attn_implementation."
            )

    @torch.no_grad()
    def check_generation(self) -> None:
        """Refuse a family whose writing is not that of its training forward, or depends on what fills a shorter prompt
        up in a batch.

        Two tokens are written after a prompt, alone and beside a longer one with two different fillings.
        """
        from transformers import GenerationConfig

        prompt, longer = self.embed(self._probe_ids(5, seed=4)), self.embed(self._probe_ids(9, seed=5))
        settings = GenerationConfig(
            max_new_tokens=2, do_sample=False, use_cache=True, num_beams=1, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

        def written(filling: Tensor | None) -> tuple[Tensor, Tensor]:
            embeds, mask = prompt, torch.ones(prompt.shape[:2], dtype=torch.int64, device=prompt.device)
            if filling is not None:
                embeds = torch.cat([torch.cat([filling, prompt], 1), longer])
                mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
                mask[0, : filling.shape[1]] = 0
            out = self.model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
            return out.sequences[0, -2:], torch.stack([step[0] for step in out.logits]).float()

        ids, alone = written(None)
        empty, full = (written(fill)[1] for fill in (torch.zeros_like(longer[:, :4]), longer[:, :4]))
        whole = torch.cat([prompt, self.embed(ids[None, :1])], 1)
        positions = torch.arange(whole.shape[1], device=self.device)[None]
        forward = self.head(self.hidden(whole, positions)[0, -2:]).float()
        size = torch.linalg.vector_norm(alone).clamp_min(1e-6)
        drifts = [float(torch.linalg.vector_norm(alone - other) / size) for other in (forward, empty, full)]
        # The same sums in other shapes; in 16 bits a router may then choose another expert of nearly the same weight.
        allowed = 1e-4 if self.dtype == torch.float32 else 0.2
        if not max(drifts) <= allowed:
            raise UserError(
                f"{self.name} ({type(self.model).__name__}): what it writes is not what it is trained on (its logits "
                f"differ from those of the training forward by {drifts[0]:.1e} of their size, and in a batch, where "
                f"shorter prompts are filled up, by {max(drifts[1:]):.1e}; allowed {allowed:.0e}). Families that carry "
                "a state through the filling cannot be used; give another language model (model.llm.name_or_path)"
            )

    def _probe_ids(self, length: int, seed: int = 0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocab, (1, length), generator=draw).to(self.device)


def source_of(cfg: LlmConfig | VisionConfig) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) for ``from_pretrained``; a .gguf file is named through its folder.

    Raises `UserError` for a .gguf file that is not there and for a folder of adapters.
    """
    setting = f"model.{'llm' if isinstance(cfg, LlmConfig) else 'vision'}.name_or_path"
    check_no_adapter(cfg.name_or_path, setting)
    path = Path(cfg.name_or_path)
    # "a/b" may be a hub name; a path of another form, or one below a folder that is here, is none.
    gguf = cfg.name_or_path.endswith(".gguf")
    meant = path.is_absolute() or cfg.name_or_path.startswith((".", "~")) or len(path.parts) > 2
    if not gguf and not path.exists() and (meant or (len(path.parts) == 2 and path.parent.is_dir())):
        raise UserError(f"{setting}: no folder {cfg.name_or_path!r}; expected a folder with config.json, or a hub name")
    where: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    if not gguf:
        return cfg.name_or_path, where
    if not path.is_file():
        raise UserError(f"model.llm.name_or_path: no file {cfg.name_or_path!r}")
    check_no_pointer(path)
    return str(path.parent), {**where, "gguf_file": path.name}


def load_tokenizer(cfg: LlmConfig, *, beside: Path | None = None) -> Any:
    """The model's own tokenizer, or that of the folder ``beside`` lies in, for which no hub is asked. Raises
    `UserError` when there is none."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    name, where = source_of(cfg)
    if beside is not None and not Path(name).is_dir():
        name, where = str(beside.parent), {"trust_remote_code": cfg.trust_remote_code, "local_files_only": True}
    what = f"model.llm.name_or_path {cfg.name_or_path!r}: its tokenizer"
    folder = None if "gguf_file" in where else name
    wanted = (
        "The folder must hold one, in tokenizer.json, tokenizer_config.json and special_tokens_map.json or what its "
        "family has instead; get these files again."
    )
    try:
        with loading(what, wanted, folder):
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
            tokenizer.convert_ids_to_tokens(tokenizer("a b")["input_ids"])
            _ = tokenizer.all_special_ids
    except UserError as e:
        if "gguf_file" not in where or not isinstance(e.__cause__, AttributeError) or "bos_token_id" not in str(e):
            raise
        raise UserError(  # transformers before 5.18
            f"{what} cannot be read by this version of transformers, because the file names no beginning-of-text token "
            "(tokenizer.ggml.bos_token_id): update transformers to 5.18 or later, or give a Hugging Face folder"
        ) from e
    if "gguf_file" in where and Version(transformers.__version__) < Version("5.18"):
        # These give the token that begins a text as the one that ends it.
        config = AutoConfig.from_pretrained(name, **where)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        # What transformers makes up for a folder that holds a config.json alone: text would become nothing.
        raise UserError(
            f"{what} is not there: {name} has no tokenizer files (tokenizer.json, or what its family has instead); put "
            "the model's own beside its config.json"
        )
    return tokenizer


def read_language(cfg: LlmConfig, dtype: torch.dtype) -> Any:
    """The causal language model named by the settings, strictly loaded. Raises `UserError` for files that do not fit,
    NaN weights, adapters instead of a model, and attention the family does not have."""
    from transformers import AutoModelForCausalLM

    name, where = source_of(cfg)
    if "gguf_file" in where:
        where |= dequantize()
    wanted = (
        "Its config.json, or a file of weights, is damaged or of something else: get its files again. Give a Hugging "
        "Face causal language model (hub name or folder), or a .gguf file."
    )
    folder = None if "gguf_file" in where else name
    with kernel_at_hand(cfg), loading(f"model.llm.name_or_path {cfg.name_or_path!r}", wanted, folder):
        model, info = from_pretrained(
            AutoModelForCausalLM, name, dtype=dtype, attn_implementation=cfg.attn_implementation, **where
        )
    check_soft_cap(model.config, cfg)
    check_loading_info(info, model, cfg.name_or_path)
    check_finite(model, cfg.name_or_path)
    if "gguf_file" in where:
        forget_quantizer(model)
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    # Not model.to(dtype): that rounds what transformers keeps in fp32, rotary frequencies above all.
    return model


def load_language(
    cfg: LlmConfig, device: torch.device, made: tuple[Any, str] | None = None
) -> tuple[LanguageModel, Any]:
    """The language model and its tokenizer: strictly loaded, frozen, in eval mode, on ``device``. ``made``: a model in
    place of the one that is named, and what it is called (`model.student`).

    Raises `UserError` for files that do not fit, NaN weights, adapters instead of a model, attention the family does
    not have, and families that cannot be run from embeddings, or not with what they compute themselves. Whether the
    tokenizer's ids have rows is `data.chat`'s to say, which knows what can occur (`ChatEncoder.check_table`).
    """
    from transformers import GenerationConfig

    model, name = made or (read_language(cfg, DTYPES[cfg.precision]), cfg.name_or_path)
    model = model.to(device=device)
    # The checkpoint's own sampling defaults (top_k, temperature, …) would silently fill what a caller leaves unset.
    model.generation_config = GenerationConfig()
    if (
        device.type == "cpu"
        and model.config._attn_implementation == "sdpa"
        and type(model).__module__.startswith("transformers.")
        # Llama 4's chunks are known to the mask alone, which ours does not read.
        and "chunked_attention" not in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    ):
        attention.register()
        model.set_attn_implementation(attention.NAME)
    with running(name, model):
        language = LanguageModel(model, name, cfg.gradient_checkpointing)
        language.check_head()
        language.check_generation()
        language.check_packing()
    return language, load_tokenizer(cfg)


_WANTED = "Its config.json must be that of a causal language model."


def _sizes_of(cfg: LlmConfig) -> str:
    return f"sizes of model.llm {cfg.name_or_path!r}"


def read_config(cfg: LlmConfig) -> Any:
    """The language model's configuration. Raises `UserError` where there is none."""
    from transformers import AutoConfig

    with loading(_sizes_of(cfg), _WANTED, cfg.name_or_path):
        name, where = source_of(cfg)
        config = AutoConfig.from_pretrained(name, **where)
        check_stated(name, config)
        if "gguf_file" not in where and Path(name).is_dir():  # else a plan would download the weights
            check_depth(name, cfg.revision, config)
    return config


def empty_language(cfg: LlmConfig, config: Any = None) -> Any:
    """The language model on the meta device, from its configuration alone. Raises `UserError` for attention that the
    family does not have, and for a configuration that is not there or not that of a causal language model."""
    from transformers import AutoModelForCausalLM

    folder = None if config else cfg.name_or_path
    config = config or read_config(cfg)
    with kernel_at_hand(cfg), loading(_sizes_of(cfg), _WANTED, folder):
        check_soft_cap(config, cfg)
        # Other kernels may not be installed where a run is planned.
        kernel = {"attn_implementation": "sdpa"} if cfg.attn_implementation == "sdpa" else {}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code, **kernel)


def dequantize() -> dict[str, Any]:
    """Ask for plain dense weights where this transformers would otherwise keep the file's blocks (5.20 and later)."""
    try:
        from transformers.utils.quantization_config import GgufConfig  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_quantizer(model: Any) -> None:
    """A dequantised model is an ordinary one: without this, `save_pretrained` and ``.to`` refuse."""
    for holder, mark in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, mark):
            delattr(holder, mark)
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, mark, False):
            setattr(model, mark, False)
