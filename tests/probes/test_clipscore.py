from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from beholder.probes.clipscore import ClipJudge, clip_score, clip_scores
from beholder.types import UserError

TEXTS = ["a red square", "two blue discs on black", "", "a green triangle beside a very long list of other things"]
REFERENCES = [
    ["a red square"],
    ["blue discs", "something else"],
    ["an empty picture"],
    ["a triangle", "shapes", "things"],
]
CONTROL = ("<|startoftext|>", "<|endoftext|>")
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_convert_rgb": True, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def pictures() -> list[Image.Image]:
    """Wide, tall, square, and grey with another mode."""
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (33, 71), (32, 32)]
    made = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    return [*made, Image.fromarray(rng.integers(0, 256, (50, 50), dtype=np.uint8))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with a byte tokenizer that brackets every text, as CLIP's own does."""
    path = tmp_path_factory.mktemp("clip")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(CONTROL))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{CONTROL[0]} $A {CONTROL[1]}", special_tokens=[(t, inner.token_to_id(t)) for t in CONTROL]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=CONTROL[0], eos_token=CONTROL[1], pad_token=CONTROL[1]
    ).save_pretrained(str(path))  # fmt: skip
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**size, **ids, "vocab_size": 258, "max_position_embeddings": 48, "projection_dim": 24},
            vision_config={**size, "image_size": 32, "patch_size": 8, "projection_dim": 24}, projection_dim=24,
        )  # fmt: skip
        CLIPModel(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


def oracle(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The paper's formulas with transformers' own processor and model, one caption at a time."""
    from transformers import AutoTokenizer
    from transformers.models.clip import CLIPImageProcessorPil

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

    def text(t: str) -> np.ndarray:
        ids = tokenizer("A photo depicts " + t, truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            out = model.text_projection(model.text_model(input_ids=ids["input_ids"]).pooler_output)[0].double().numpy()
        return out / np.linalg.norm(out)

    plain, with_references = [], []
    for picture, caption, refs in zip(pictures(), TEXTS, REFERENCES, strict=True):
        with torch.no_grad():
            pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].double().numpy()
        score = 2.5 * max(float(seen @ text(caption)) / float(np.linalg.norm(seen)), 0.0)
        best = max(max(float(text(caption) @ text(r)) for r in refs), 0.0)
        plain.append(score)
        with_references.append(2 * score * best / (score + best) if score + best else 0.0)
    return np.array(plain), np.array(with_references)


def test_scores_are_the_papers_formulas(folder: Path):
    expected, expected_ref = oracle(folder)

    scores, with_references, cut = clip_scores(ClipJudge(folder), pictures(), TEXTS, REFERENCES, batch_size=3)

    # Measured: 3e-7 (fp32, other batch shapes).
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert with_references is not None
    np.testing.assert_allclose(with_references, expected_ref, atol=1e-5)
    assert cut == 1  # the long caption; cut as the oracle's
    assert len({round(float(s), 6) for s in scores}) == 4 and scores.max() > 0


def test_scores_do_not_depend_on_the_batch_size(folder: Path):
    judge = ClipJudge(folder)

    (one, ref_one, _), (all_, ref_all, _) = (
        clip_scores(judge, iter(pictures()), TEXTS, REFERENCES, batch_size=size) for size in (1, 4)
    )

    np.testing.assert_allclose(one, all_, atol=1e-5)
    assert ref_one is not None and ref_all is not None
    np.testing.assert_allclose(ref_one, ref_all, atol=1e-5)


def test_measurements_carry_intervals_and_say_who_judged(folder: Path):
    rows = clip_score(folder, (p for p in pictures()), TEXTS, REFERENCES)
    alone = clip_score(folder, pictures(), TEXTS)
    single = clip_score(folder, pictures(), TEXTS, [refs[0] for refs in REFERENCES])

    assert [m.name for m in rows] == ["clipscore.correct", "refclipscore.correct"]
    assert [m.name for m in alone] == ["clipscore.correct"] and alone[0] == rows[0]
    assert single[1] == clip_score(folder, pictures(), TEXTS, [refs[:1] for refs in REFERENCES])[1]
    for m in rows:
        assert m.n == 4 and m.better == "higher" and m.ci95 is not None and m.ci95[0] <= m.value <= m.ci95[1]
        assert folder.name in (m.caveat or "") and "1 of 4 captions were cut to its 48 tokens" in (m.caveat or "")


@pytest.mark.parametrize("size", [{"shortest_edge": 32}, {"height": 40, "width": 36}, 32])
def test_pictures_are_prepared_as_the_folder_says(folder: Path, tmp_path: Path, size: object):
    from transformers.models.clip import CLIPImageProcessorPil

    settings = {**PREPROCESSOR, "size": size}
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    own, theirs = ClipJudge(other).pixels, CLIPImageProcessorPil(**settings)

    for picture in pictures():
        expected = theirs(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(own(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0], expected)


def test_what_is_no_clip_folder_is_said_plainly(folder: Path, tmp_path: Path):
    pickle, no_weights, other, no_size, damaged = (
        shutil.copytree(folder, tmp_path / name) for name in ("pickle", "none", "other", "size", "damaged")
    )
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    (no_weights / "model.safetensors").unlink()
    (other / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    (no_size / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 3}}))
    (damaged / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])

    for path, message in (
        (pickle, r"only pytorch_model\.bin\. Weights are read from safetensors only; a pickle"),
        (no_weights, "no weights"),
        (other, "'siglip' model"),
        (no_size, "cannot tell the image size"),
        (damaged, "cannot be loaded"),
        (tmp_path / "absent", "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            clip_score(path, pictures(), TEXTS)


@pytest.mark.parametrize(
    ("file", "entry", "value"),
    [
        ("config.json", "dtype", "evil"), ("config.json", None, []), ("preprocessor_config.json", None, 3),
        ("preprocessor_config.json", "image_mean", "x"), ("preprocessor_config.json", "resample", -1),
        ("preprocessor_config.json", "crop_size", 10**9), ("preprocessor_config.json", "size", {"shortest_edge": None}),
        ("preprocessor_config.json", "do_center_crop", None), ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "pad_token", None),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_followed_are_told_with_their_file(
    folder: Path, tmp_path: Path, file: str, entry: str | None, value: object
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "clip")
    whole = json.loads((damaged / file).read_text())
    (damaged / file).write_text(json.dumps(value if entry is None else whole | {entry: value}))

    with pytest.raises(UserError) as told:
        ClipJudge(damaged)
    assert file in str(told.value) and str(damaged) in str(told.value), told.value


def test_weights_that_do_not_fit_or_are_not_numbers_are_refused(folder: Path, tmp_path: Path):
    short, nan = (shutil.copytree(folder, tmp_path / name) for name in ("short", "nan"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "text_projection" not in k}, short / "model.safetensors", {"format": "pt"}
    )
    weights["text_projection.weight"][0, 0] = float("nan")
    save_file(weights, nan / "model.safetensors", {"format": "pt"})

    with pytest.raises(UserError, match=r"text_projection\.weight"):
        ClipJudge(short)
    with pytest.raises(UserError, match=r"NaN or infinite weights in text_projection\.weight"):
        ClipJudge(nan)


def test_the_position_numbers_that_old_checkpoints_store_do_no_harm(folder: Path, tmp_path: Path):
    """OpenAI's files on the hub have them."""
    old = shutil.copytree(folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(48)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, old / "model.safetensors", {"format": "pt"})

    np.testing.assert_array_equal(
        clip_scores(ClipJudge(old), pictures(), TEXTS)[0], clip_scores(ClipJudge(folder), pictures(), TEXTS)[0]
    )


def test_a_score_that_is_not_a_number_is_an_error_that_names_it(folder: Path, tmp_path: Path):
    """A projection of zeros has no direction: 0/0."""
    flat = shutil.copytree(folder, tmp_path / "flat")
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"].zero_()
    save_file(weights, flat / "model.safetensors", {"format": "pt"})

    with pytest.raises(FloatingPointError, match=r"clipscore\.correct is not finite for caption 0, 1, 2, 3"):
        clip_score(flat, pictures(), TEXTS)


def test_captions_without_pictures_are_refused(folder: Path):
    with pytest.raises(UserError, match="no captions"):
        clip_score(folder, [], [])
    with pytest.raises(AssertionError, match="2 pictures for 4 captions"):
        clip_score(folder, pictures()[:2], TEXTS)
