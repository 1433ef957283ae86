"""The language-model door: strict loading, an exact split into embed, decoder and head, packing found out, GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from beholder.config import GenerateConfig, LlmConfig
from beholder.model import attention
from beholder.model.language import LanguageModel, empty_language, load_language, load_tokenizer
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import UserError

from .conftest import CPU, Parts


def load(path: str | Path, **settings: Any) -> LanguageModel:
    cfg = LlmConfig.model_validate({"name_or_path": str(path), "precision": "fp32"} | settings)
    return load_language(cfg, CPU)[0]


def copied(parts: Parts, tmp_path: Path) -> Path:
    shutil.copytree(parts.llm("qwen3"), tmp_path / "llm")
    return tmp_path / "llm"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saved(folder: Path, name: str, **settings: Any) -> Path:
    """A tiny random model of any transformers family with a byte tokenizer."""
    tokenizer = tiny_tokenizer(folder)
    base: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "initializer_range": 0.12,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    } | settings  # fmt: skip
    config = getattr(transformers, base.pop("config", f"{name}Config"))(**base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return folder


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Qwen2", {}), ("Mistral", {"sliding_window": 3}), ("Gemma3", {"config": "Gemma3TextConfig", "sliding_window": 3}),
    ("Gemma2", {"final_logit_softcapping": 3.0, "attn": "eager"}),
    ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}), ("Cohere", {"logit_scale": 0.06}), ("Phi3", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_the_split_model_is_the_model_and_packing_is_sound_in_every_family(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    kernel = settings.pop("attn", "sdpa")
    language = load(saved(tmp_path, name, **settings), attn_implementation=kernel)
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))

    own = language.model(input_ids=ids).logits
    hidden = language.hidden(language.embed(ids), torch.arange(20).expand(2, -1))
    ours = language.head(hidden.flatten(0, 1)).view_as(own)

    # Attention per sample against attention with a mask, fp32: worst seen 3.5e-6 (of logits up to 4).
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=3e-5)
    assert language.packing_error is None
    one, other = ids[:1, :8], ids[1:, :12]
    packed = language.hidden(
        language.embed(torch.cat([one, other], 1)), torch.cat([torch.arange(8), torch.arange(12)])[None]
    )
    alone = language.hidden(language.embed(other), torch.arange(12)[None])
    torch.testing.assert_close(packed[:, 8:], alone, rtol=1e-4, atol=3e-5)


def test_a_model_that_packs_unsoundly_is_found_out(tmp_path: Path) -> None:
    language = load(
        saved(tmp_path, "OPT", ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=64),
        attn_implementation="eager",
    )

    assert language.packing_error is not None and "train.packing: false" in language.packing_error


def test_a_family_whose_head_does_more_is_refused(tmp_path: Path) -> None:
    language = load(saved(tmp_path, "Granite", logits_scaling=8.0))
    language.config = SimpleNamespace()  # as if nothing of the family were known here

    with pytest.raises(UserError, match="differ from its own"):
        language.check_head()


def test_the_embedding_size_is_that_of_what_embed_returns(parts: Parts, tmp_path: Path) -> None:
    plain = load(parts.llm("qwen3"))
    table = plain.model.get_input_embeddings().weight
    assert plain.embed_rms == pytest.approx(float(table.square().mean().sqrt()), rel=1e-5)
    assert (plain.vocab, plain.d_text) == tuple(table.shape)

    scaled = load(saved(tmp_path, "Gemma3", config="Gemma3TextConfig"))
    table = scaled.model.get_input_embeddings().weight
    assert scaled.embed_rms == pytest.approx(8 * float(table.square().mean().sqrt()), rel=1e-5), (
        "Gemma scales by sqrt(64)"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_attention_replaces_sdpa_on_a_cpu_and_changes_rounding_only(parts: Parts, precision: str) -> None:
    ours = load(parts.llm("qwen3"), precision=precision)
    eager = load(parts.llm("qwen3"), precision=precision, attn_implementation="eager")
    assert (ours.attention, eager.attention) == (attention.NAME, "eager")
    ids = torch.randint(0, 250, (2, 50), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1)

    with torch.no_grad():
        a, b = (m.hidden(m.embed(ids), positions).float() for m in (ours, eager))

    # The same sums at this size (worst seen 0); other shapes may round differently, 2^-9 a layer in bf16.
    assert float((a - b).norm() / b.norm()) < (1e-5 if precision == "fp32" else 2e-2)


def test_a_missing_weight_is_named(parts: Parts, tmp_path: Path) -> None:
    folder = rewrite(copied(parts, tmp_path), lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lack.*layers\.1\.mlp\.up_proj"):
        load(folder)


def test_a_weight_without_a_place_is_named(parts: Parts, tmp_path: Path) -> None:
    folder = rewrite(copied(parts, tmp_path), lambda w: w.update({"vision_ln.weight": torch.ones(3)}))
    with pytest.raises(UserError, match=r"no place for: vision_ln\.weight"):
        load(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(parts: Parts, tmp_path: Path) -> None:
    folder = rewrite(copied(parts, tmp_path), lambda w: w.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(UserError, match=r"another shape: model\.norm\.weight \(file \[3\], model \[64\]\)"):
        load(folder)


def test_weights_that_are_not_finite_are_named(parts: Parts, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")

    with pytest.raises(UserError, match=r"NaN or infinite weights in model\.layers\.0\.mlp\.up_proj"):
        load(rewrite(copied(parts, tmp_path), spoil))


def test_names_that_lead_nowhere_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)
    with pytest.raises(UserError, match="no file"):
        load(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"no folder .*expected a folder with config\.json"):
        load(tmp_path / "nowhere")


def test_the_checkpoints_own_sampling_defaults_are_forgotten(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    transformers.GenerationConfig(do_sample=True, top_k=1, temperature=9.0).save_pretrained(folder)
    prompt = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with_defaults, without = load(folder), load(parts.llm("qwen3"))

    for temperature, top_p in ((0.0, 1.0), (1.0, 0.9)):
        how = GenerateConfig(temperature=temperature, top_p=top_p, max_new_tokens=12)
        a, b = (m.generate([prompt], how, eos_ids=[0], seed=3) for m in (with_defaults, without))
        assert a == b


def test_what_a_seed_gives_does_not_depend_on_who_writes_at_once(parts: Parts) -> None:
    model = load(parts.llm("qwen3"))
    prompt = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    how = GenerateConfig(temperature=1.3, top_p=1.0, max_new_tokens=30)

    def write(seed: int) -> list[list[int]]:
        return model.generate([prompt], how, eos_ids=[0], seed=seed)

    alone = [write(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(8))) == alone
    assert len({tuple(answer[0]) for answer in alone}) > 1


# ---------------------------------------------------------------------------------------------------------------
# GGUF: a file written here from a tiny Llama, quantised as real files are


def write_gguf(path: Path, model: Any, tokenizer: Any, bos: int | None = None) -> dict[str, torch.Tensor]:
    """``model`` as a Q8_0 GGUF file; returns the weights as the file's blocks represent them."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import dequantize, quantize

    c = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    tokens[tokenizer.convert_tokens_to_ids("<|im_start|>")] = "ab"  # a byte-level BPE has at least one merge
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens[tokenizer.convert_tokens_to_ids("~")] = "cd"
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL if len(t) <= 2 else TokenType.CONTROL for t in tokens])
    writer.add_token_merges(["a b", "c d"])  # one alone is read as text by transformers 5.15
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if bos is not None:
        writer.add_bos_token_id(bos)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    kept: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        array = value.float().numpy()
        stem = key.removeprefix("model.").removesuffix(".weight")
        if stem.startswith("layers."):
            _, number, inner = stem.split(".", 2)
            name = f"blk.{number}.{names[inner]}.weight"
        else:
            name = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[stem]
        if array.ndim == 1:
            writer.add_tensor(name, array)
            kept[key] = value
            continue
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp keeps the two halves of a rotary pair side by side
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        blocks = quantize(np.ascontiguousarray(array), GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        array = dequantize(blocks, GGMLQuantizationType.Q8_0)
        if heads:
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kept[key] = torch.from_numpy(array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_gguf_file_loads_dense_with_the_weights_of_its_blocks(parts: Parts, tmp_path: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(parts.llm("smollm2"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.llm("smollm2"))
    kept = write_gguf(tmp_path / "tiny.Q8_0.gguf", original, tokenizer)

    cfg = LlmConfig(name_or_path=str(tmp_path / "tiny.Q8_0.gguf"), precision="fp32")
    if Version(transformers.__version__) < Version("5.18"):  # which cannot do without a beginning-of-text token
        with pytest.raises(UserError, match=r"names no beginning-of-text token.*update transformers"):
            load_language(cfg, CPU)
        return
    language, read = load_language(cfg, CPU)

    weights = language.model.state_dict()
    for key, value in kept.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6, msg=key)
    assert {p.dtype for p in language.parameters()} == {torch.float32}
    assert read.convert_tokens_to_ids("a") == tokenizer.convert_tokens_to_ids("a")
    language.model.save_pretrained(tmp_path / "again")  # refuses while quantizer marks are left
    assert (tmp_path / "again" / "model.safetensors").exists()
    with torch.no_grad():
        ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
        original.load_state_dict(kept | {"lm_head.weight": kept["model.embed_tokens.weight"]})
        torch.testing.assert_close(language.model(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_gguf_files_end_token_is_the_files_own(parts: Parts, tmp_path: Path) -> None:
    """transformers before 5.18 give the token that begins a text."""
    original = transformers.AutoModelForCausalLM.from_pretrained(parts.llm("smollm2"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.llm("smollm2"))
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    write_gguf(tmp_path / "tiny.gguf", original, tokenizer, bos=begin)

    read = load_tokenizer(LlmConfig(name_or_path=str(tmp_path / "tiny.gguf")))

    assert (read.bos_token_id, read.eos_token_id) == (begin, tokenizer.eos_token_id)
    assert (read.bos_token, read.eos_token) == ("<|endoftext|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("layers", "told"), [(10_000_000, "no model has more than 4096"), (2000, "its files of weights")]
)
def test_far_more_layers_than_the_files_hold_are_told_before_they_are_built(
    parts: Parts, tmp_path: Path, layers: int, told: str
) -> None:
    shutil.copytree(parts.llm("qwen3"), tmp_path / "deep")
    path = tmp_path / "deep" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"}
    path.write_text(json.dumps(config | {"num_hidden_layers": layers}))

    cfg = LlmConfig(name_or_path=str(path.parent), precision="fp32")
    for build in (lambda: load_language(cfg, CPU), lambda: empty_language(cfg)):
        with pytest.raises(UserError, match=rf"num_hidden_layers {layers}.*{told}"):
            build()


@pytest.mark.parametrize("made", ["folder", "gguf"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_positions_are_those_of_the_model_as_transformers_loads_it(parts: Parts, tmp_path: Path, made: str) -> None:
    """Rotary frequencies stay in fp32 whatever the weights are in: rounded to 8 bits, position 3000 is another one."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(parts.llm("smollm2"), dtype=torch.bfloat16)
    where = Path(parts.llm("smollm2"))
    if made == "gguf":
        if Version(transformers.__version__) < Version("5.18"):
            pytest.skip("which cannot do without a beginning-of-text token")
        where = tmp_path / "tiny.gguf"
        write_gguf(where, theirs, transformers.AutoTokenizer.from_pretrained(parts.llm("smollm2")))
    language = load(where, precision="bf16")
    positions = torch.tensor([[0, 1, 500, 3000, 60_000]])
    hidden = torch.zeros(1, 5, language.d_text)

    ours = language.decoder.rotary_emb(hidden, positions)  # type: ignore[operator]

    for a, b in zip(ours, theirs.model.rotary_emb(hidden, positions), strict=True):
        assert torch.equal(a, b)
    assert {p.dtype for p in language.parameters()} == {torch.bfloat16} and language.computed_in == "float32"
    rounded = theirs.model.rotary_emb.to(torch.bfloat16)(hidden, positions)
    assert (ours[0] - rounded[0]).abs().max() > 0.5, "what it would be otherwise"


def test_far_too_many_layers_under_a_hub_name_are_told_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = transformers.LlamaConfig(num_hidden_layers=1_000_000)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: deep)

    with pytest.raises(UserError, match=r"somebody/deep: config.json says num_hidden_layers 1000000 .*more than 4096"):
        empty_language(LlmConfig(name_or_path="somebody/deep"))
