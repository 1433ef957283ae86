"""Whole vision-language models of Hugging Face, tiny and random, of the real classes: what we compute is what they
compute, and a sample is laid out as their own processor does it."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.conftest import TinyParts

from beholder.config import GenerateConfig, LlmConfig, LoraConfig, ModelConfig
from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.collate import Layout, SampleBuilder, collate
from beholder.data.images import NativePipeline
from beholder.data.same_ids import check_same_ids, messages
from beholder.model.families import running
from beholder.model.native import EYES_LEARN, FAMILIES, NativeModel, known_family, load_native, processor_of
from beholder.model.placement import Selector, inside, resolve_targets
from beholder.model.plan import TrainPlan, apply_train_plan, frozen_fingerprint
from beholder.model.processor import NativeProcessor, load_processor
from beholder.model.sites import empty_parts
from beholder.model.vision import check_reached
from beholder.prepare.tiny import tiny_native
from beholder.train.nonfinite import only
from beholder.types import Batch, Example, ImageInput, ImageRef, ImageSlot, TokenLosses, Turn, UserError

CPU = torch.device("cpu")
TEMPLATES = Path(__file__).parent / "native_templates"
"""Of each class, what its checkpoints on the hub have as chat_template.jinja."""
LLAVA_AS_TRAINED = Path(__file__).parents[2] / "configs" / "native" / "llava_1_5.jinja"
PICTURES = [(40, 56), (96, 64), (33, 100)]
TWO = [("user", ("First: ", ImageSlot(0), " then ", ImageSlot(1), "\nWhich?")), ("assistant", ("The first.",))]
TALKS = [
    [("user", (ImageSlot(0), "\n", "What colour is it?")), ("assistant", ("Red.",))],
    [("user", ("Look: ", ImageSlot(0), "and?")), ("assistant", ("A disc.",)), ("user", ("Sure?",)),
     ("assistant", ("Yes, 100 % sure.",))],
    [("user", ("Is it large?", ImageSlot(0))), ("assistant", ("It is not that large, no.",))],
]  # fmt: skip


class Native:
    """A loaded tiny model with its encoder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_native(LlmConfig(name_or_path=str(folder), precision="fp32"), CPU)
        self.processor = self.model.geometry
        self.encoder = encoder_of(self.model, self.tokenizer)

    def sample(self, k: int) -> tuple[str, Any, list[ImageInput]]:
        example = Example(str(k), (ImageRef("", "0"),), turns(TALKS[k]), file="test")
        return str(k), self.encoder.encode(example, [PICTURES[k]]), [self.processor.process(picture(k))]

    def two(self, first: int, second: int) -> tuple[str, Any, list[ImageInput]]:
        """A sample of two images."""
        example = Example("two", (ImageRef("", "0"), ImageRef("", "1")), turns(TWO), file="test")
        encoded = self.encoder.encode(example, [PICTURES[first], PICTURES[second]])
        return "two", encoded, [self.processor.process(picture(k)) for k in (first, second)]

    def batch(self, which: list[int], *, packing: bool) -> Batch:
        return collate([self.sample(k) for k in which], Layout(packing, 4096, 8))


def encoder_of(model: NativeModel, tokenizer: Any, **settings: Any) -> ChatEncoder:
    return ChatEncoder(
        tokenizer, num_visual_tokens=None, max_seq_len=4096, template="chat", instruction="", instruction_multi="",
        images=model.geometry, chat_template=model.geometry.chat_template, **settings,
    )  # fmt: skip


def turns(talk: list[Any]) -> tuple[Turn, ...]:
    return tuple(Turn(role, parts) for role, parts in talk)


def picture(k: int) -> Image.Image:
    height, width = PICTURES[k]
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8))


def per_sample(out: TokenLosses) -> list[torch.Tensor]:
    return [out.nll[out.sample == i] for i in range(int(out.sample.max()) + 1)]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tiny_native(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tiny_native(tmp_path_factory.mktemp("qwen")))


def test_what_it_computes_itself_stays_as_transformers_has_it(native: Native) -> None:
    """Rotary frequencies of decoder and tower: rounded with the weights, positions far on would be others."""
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(native.folder, dtype=torch.bfloat16)
    ours, _ = load_native(LlmConfig(name_or_path=str(native.folder), precision="bf16"), CPU)

    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.whole.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
    assert "float32" in ours.language.computed_in


@pytest.mark.parametrize("k", [0, 1, 2])
def test_ids_and_mask_are_those_of_the_processor(native: Native, k: int) -> None:
    own = native.processor.processor
    talk = turns(TALKS[k])
    _, encoded, _ = native.sample(k)

    text = own.apply_chat_template(messages(talk), tokenize=False)
    theirs = own(text=[text], images=[picture(k)], return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    assert encoded.ids.tolist() == theirs.tolist()
    # The mask, derived from the processor alone: what it writes between its prompt and the end of an answer.
    expected = np.zeros(len(theirs), dtype=bool)
    for n, turn in enumerate(talk):
        if turn.role == "assistant":
            asked = native.processor.ids(messages(talk[:n]), [picture(k)], prompt=True)
            end = len(asked) + theirs[len(asked) :].tolist().index(native.encoder.eos_ids[0]) + 1
            expected[len(asked) : end] = True
    assert np.array_equal(encoded.supervise, expected)
    assert [int(i) for i in encoded.ids[encoded.reserved(0)]] == [native.processor.token_id] * len(encoded.reserved(0))


def test_images_of_different_sizes_take_as_many_positions_as_the_processor_says(qwen: Native) -> None:
    lengths = qwen.batch([0, 1, 2], packing=False).image_lengths.tolist()

    merged = [int(qwen.processor.process(picture(k)).inputs["image_grid_thw"].prod()) // 4 for k in range(3)]  # type: ignore[index]
    assert lengths == merged and len(set(lengths)) == 3


def test_labels_stand_before_what_the_template_writes_around_an_image(qwen: Native) -> None:
    encoder = encoder_of(qwen.model, qwen.tokenizer, image_label="Image {k}: ")
    parts = (ImageSlot(0), "\nImage 2: ", ImageSlot(1), "\n", "Which is red?")
    example = Example("0", (ImageRef("", "0"), ImageRef("", "1")), (Turn("user", parts), Turn("assistant", ("1.",))))
    encoded = encoder.encode(example, PICTURES[:2])

    (first, _), (second, _) = encoded.image_spans
    assert encoder.tokenizer.decode(encoded.ids[:first]).endswith("user\nImage 1: <|vision_start|>")
    between = encoder.tokenizer.decode(encoded.ids[encoded.image_spans[0][1] : second])
    assert between == "<|vision_end|>\nImage 2: <|vision_start|>"
    assert encoder.fingerprint != qwen.encoder.fingerprint


def test_a_sample_that_is_too_long_is_refused_not_cut_inside_an_image(qwen: Native) -> None:
    encoder = encoder_of(qwen.model, qwen.tokenizer)
    encoder.max_seq_len = 30
    example = Example("0", (ImageRef("", "0"),), turns(TALKS[0]), file="test")

    with pytest.raises(UserError, match=r"the prompt alone takes \d+ tokens \(1 images\).*smaller images"):
        encoder.encode(example, [(128, 128)])


def test_the_loss_is_the_models_own_on_the_same_conversation(native: Native) -> None:
    own = native.processor.processor
    whole = native.model.whole
    for k, talk in enumerate(TALKS):
        _, encoded, _ = native.sample(k)
        text = own.apply_chat_template(messages(turns(talk)), tokenize=False)
        inputs = own(text=[text], images=[picture(k)], return_tensors="pt", add_special_tokens=False)
        labels = inputs["input_ids"].masked_fill(~torch.from_numpy(encoded.supervise)[None], -100)
        with torch.no_grad():
            theirs = whole(**inputs, labels=labels).loss
            ours = native.model(native.batch([k], packing=False)).nll.mean()

        # fp32, other shapes of the same sums: worst seen 3e-7.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def kept(native: Native, batch: Batch) -> Batch:
    """The batch as it is read from the feature store, but for images without anything in them."""
    images = [image if image.blank else native.model.keep(image) for image in batch.images]
    assert not any(image.inputs is not None for image in images)
    return replace(batch, images=images)


def test_what_is_kept_of_an_image_gives_the_same_bits(native: Native) -> None:
    """Losses and what is written, of samples of one and of two images of different sizes, an empty one among them."""
    samples = [native.sample(1), native.sample(2)]
    if native.processor.most_images != 1:
        samples.append(native.two(0, 1))
        samples[1][2][0] = ImageInput(blank=("noise", 3))
    batch = collate(samples, Layout(False, 4096, 8))
    prompts, how = [sample[1] for sample in samples], GenerateConfig(temperature=0.0, max_new_tokens=4)

    assert native.model.check_kept() is None
    shape, dtype = native.model.kept_like
    said = native.model.keep(native.processor.process(picture(0))).features
    assert said is not None and (said.shape[1:], said.dtype) == (shape, dtype)
    assert (shape[0] > 1) == bool(native.model.family.deep)
    with torch.no_grad():
        assert torch.equal(native.model(kept(native, batch)).nll, native.model(batch).nll)
    seen, stored = ([i.images for i in split(b)] for b in (batch, kept(native, batch)))
    assert native.model.generate(prompts, stored, how, eos_ids=[7]) == (
        native.model.generate(prompts, seen, how, eos_ids=[7])
    )


def split(batch: Batch) -> list[Batch]:
    return [only(batch, i) for i in range(len(batch.ids))]


def test_what_is_kept_in_16_bits_is_what_the_eyes_compute_in(qwen: Native) -> None:
    model, _ = load_native(LlmConfig(name_or_path=str(qwen.folder), precision="bf16"), CPU)
    one = model.geometry.process(picture(1))
    batch = replace(qwen.batch([1], packing=False), images=[one])

    stored = model.keep(one)
    assert stored.features is not None and stored.features.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(replace(batch, images=[stored])).nll, model(batch).nll)


def test_what_one_thread_writes_from_another_does_not_see(qwen: Native) -> None:
    """A stream may be read while something else is asked."""
    model, one = qwen.model, qwen.processor.process(picture(0))
    said = model.keep(one).features
    assert said is not None and one.inputs is not None
    with model._having_seen([torch.zeros_like(said)]), ThreadPoolExecutor(1) as other:
        here = model.whole.model.get_image_features(**one.inputs).pooler_output
        there = other.submit(lambda: model.keep(one).features).result()

    assert not torch.cat(list(here)).any() and there is not None and torch.equal(there, said)


def test_features_of_another_layout_are_refused(qwen: Native) -> None:
    batch = qwen.batch([0, 1], packing=False)
    swapped = replace(kept(qwen, batch), images=kept(qwen, batch).images[::-1])

    with pytest.raises(UserError, match=r"images produced \d+ visual tokens but their prompts reserve \d+ positions"):
        qwen.model(swapped)


def test_eyes_are_known_by_their_weights_and_the_language_model_s_do_not_matter(native: Native) -> None:
    from beholder.model import adapters

    model, whole = native.model, native.model.whole
    before = model.kept_fingerprint()
    try:
        adapters.attach(model.language.part, LoraConfig(enable=True, r=2, target_modules=("q_proj",)), 0)
        with torch.no_grad():
            model.language.part.module.get_input_embeddings().weight.add_(1)
        assert model.kept_fingerprint() == before
        for eye in model.family.eyes:  # tower, and connector where that is a module of its own
            with torch.no_grad():
                list(whole.model.get_submodule(eye).parameters())[-1].add_(1e-3)
            assert model.kept_fingerprint() != before
            before = model.kept_fingerprint()
    finally:
        undo(native)


def test_what_depends_on_other_images_is_not_kept(qwen: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    core = qwen.model.whole.model
    own = core.get_image_features

    def mixed(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        mean = torch.cat(list(out.pooler_output)).mean(0)
        out.pooler_output = [tokens + mean for tokens in out.pooler_output]
        return out

    monkeypatch.setattr(core, "get_image_features", mixed)

    assert qwen.model.check_kept() == "what its eyes say of an image depends on which others are shown with it"


@pytest.mark.parametrize(("first", "second"), [(0, 1), (2, 0)])
def test_two_images_of_different_size_in_one_sample_are_seen_as_the_model_sees_them(
    native: Native, first: int, second: int
) -> None:
    own, whole, shown = native.processor.processor, native.model.whole, [[picture(first), picture(second)]]
    if native.processor.most_images == 1:
        with pytest.raises(UserError, match="2 images, but this class of native model takes 1 a sample"):
            native.two(first, second)
        return
    text = own.apply_chat_template(messages(turns(TWO)), tokenize=False)
    inputs = own(text=[text], images=shown, return_tensors="pt", add_special_tokens=False)
    sample = native.two(first, second)
    _, encoded, images = sample
    batch = collate([native.sample(1), sample], Layout(False, 4096, 8))  # beside one that has one image
    labels = inputs["input_ids"].masked_fill(~torch.from_numpy(encoded.supervise)[None], -100)
    question = Example("two", (ImageRef("", "0"), ImageRef("", "1")), turns(TWO[:1]), file="test")
    asked = own.apply_chat_template(messages(turns(TWO[:1])), tokenize=False, add_generation_prompt=True)
    given = own(text=[asked], images=shown, return_tensors="pt", add_special_tokens=False)

    with torch.no_grad():
        theirs = whole(**inputs, labels=labels)
        out = native.model(batch)
        plan = native.model._shown(batch.images, batch.image_sizes)
        hidden = native.model._hidden(batch, plan, native.model._positions(batch, plan))[1, : len(encoded.ids)]
    new = whole.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=7, pad_token_id=7)

    assert encoded.ids.tolist() == inputs["input_ids"][0].tolist()
    # fp32, other shapes of the same sums
    torch.testing.assert_close(native.model.language.head(hidden), theirs.logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.nll[out.sample == 1].mean(), theirs.loss, rtol=1e-5, atol=1e-5)
    prompts = [native.encoder.encode_prompt(question, [PICTURES[first], PICTURES[second]])]
    how = GenerateConfig(temperature=0.0, max_new_tokens=5)
    written = native.model.generate(prompts, [images], how, eos_ids=[7])
    assert written == [new[0, given["input_ids"].shape[1] :].tolist()]


def test_a_sample_taken_out_of_a_batch_keeps_its_images_and_their_sizes(native: Native) -> None:
    middle = native.sample(1) if native.processor.most_images == 1 else native.two(1, 2)
    batch = collate([native.sample(0), middle, native.sample(2)], Layout(False, 4096, 8))

    with torch.no_grad():
        together = native.model(batch)
        for i in range(3):
            torch.testing.assert_close(
                native.model(only(batch, i)).nll, together.nll[together.sample == i], rtol=1e-4, atol=1e-5
            )


def test_packed_samples_are_what_they_are_alone(native: Native) -> None:
    if native.model.language.packing_error is not None:
        pytest.skip("this class is padded")
    padded, packed = (native.batch([0, 1, 2], packing=p) for p in (False, True))
    assert packed.input_ids.shape[0] == 1 and padded.input_ids.shape[0] == 3

    with torch.no_grad():
        pairs = list(zip(per_sample(native.model(padded)), per_sample(native.model(packed)), strict=True))

    for alone, together in pairs:  # a leak moves losses by tenths
        torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)


def test_what_it_writes_is_what_the_model_writes(native: Native) -> None:
    own, how = native.processor.processor, GenerateConfig(temperature=0.0, max_new_tokens=5)
    prompts, images, expected = [], [], []
    for k, talk in enumerate(TALKS):
        example = Example(str(k), (ImageRef("", "0"),), turns(talk[:1]), file="test")
        prompts.append(native.encoder.encode_prompt(example, [PICTURES[k]]))
        images.append([native.processor.process(picture(k))])
        text = own.apply_chat_template(messages(turns(talk[:1])), tokenize=False, add_generation_prompt=True)
        inputs = own(text=[text], images=[picture(k)], return_tensors="pt", add_special_tokens=False)
        out = native.model.whole.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=7, pad_token_id=7)
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())

    assert native.model.generate(prompts, images, how, eos_ids=[7]) == expected
    assert [native.model.generate([p], [i], how, eos_ids=[7])[0] for p, i in zip(prompts, images, strict=True)] == (
        expected
    )


def test_an_empty_image_takes_the_place_of_the_one_it_stands_for(native: Native) -> None:
    which = [0, 1, 2]
    batch = native.batch(which, packing=False)
    losses = {}
    for blank in (("zero", 0), ("noise", 1), ("noise", 1), ("noise", 2)):
        shown = collate([(*native.sample(k)[:2], [ImageInput(blank=blank)]) for k in which], Layout(False, 4096, 8))  # type: ignore[arg-type]
        assert torch.equal(shown.image_positions, batch.image_positions)
        with torch.no_grad():
            now = native.model(shown).nll
        assert blank not in losses or torch.equal(losses[blank], now)
        losses[blank] = now
    own = native.model(batch).nll.detach()
    assert not torch.equal(losses["zero", 0], own) and not torch.equal(losses["noise", 1], losses["noise", 2])


def test_the_zero_image_is_zero_and_noise_has_unit_variance(qwen: Native) -> None:
    zero, noise = qwen.processor.blank((64, 96), 0.0), qwen.processor.blank((64, 96), 5)

    real = qwen.processor.process(Image.new("RGB", (96, 64))).inputs
    assert real is not None and zero["pixel_values"].shape == real["pixel_values"].shape == noise["pixel_values"].shape
    assert torch.equal(zero["image_grid_thw"], real["image_grid_thw"])
    assert not zero["pixel_values"].any() and abs(float(noise["pixel_values"].std()) - 1) < 0.05
    frames = noise["pixel_values"].view(-1, 3, 2, 8, 8)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])  # one picture, not a film


def test_adapters_learn_and_nothing_else(native: Native) -> None:
    from beholder.model import adapters

    before = frozen_fingerprint(native.model)
    targets = tuple(rf".*language_model.*\.{name}|.*text_model.*\.{name}" for name in ("q_proj", "up_proj"))
    batch = native.batch([0, 1], packing=False)
    with torch.no_grad():
        plain = native.model(batch).nll
    adapters.attach(native.model.language.part, LoraConfig(enable=True, r=2, target_modules=targets), 0)
    try:
        table = apply_train_plan(native.model, TrainPlan(connector="frozen", language="lora"))
        native.model(batch).nll.sum().backward()
        with torch.no_grad():
            for name, weight in adapters.adapter_parameters(native.model.language.part).items():
                assert ".lora_" in name
                if ".lora_B." in name:
                    assert weight.grad is not None and float(weight.grad.abs().max()) > 0, name
                    weight += 0.1
        native.model.train(False)
        with torch.no_grad():
            adapted = native.model(batch).nll
            with native.model.adapters_off():
                off = native.model(batch).nll
        assert torch.equal(off, plain) and not torch.equal(adapted, plain)
        assert all(row.trainable == 0 for row in table.rows if row.part != "lora")
        after = frozen_fingerprint(native.model)
        assert {k: v for k, v in after.items() if k != "lora"} == before
        assert {"vision", "language"} <= set(before)
        state = native.model.trained_state()
        assert not state["connector"].tensors
        assert all(k.startswith("base_model.model.model.") for k in state["adapter"].tensors)
    finally:
        undo(native)


def test_adapters_on_its_tower_learn_and_the_rest_of_the_model_is_untouched(native: Native) -> None:
    from beholder.model import adapters

    model = native.model
    before = frozen_fingerprint(model)
    batch = native.batch([0, 1], packing=False)
    with torch.no_grad():
        plain = model(batch).nll
    part = model.parts()["vision"]
    try:
        adapters.attach(part, LoraConfig(enable=True, r=2, vit_layers="first-1", vit_target_modules=("all-linear",)), 0)
        assert model.check_kept() == EYES_LEARN
        check_reached(part)
        table = apply_train_plan(model, TrainPlan(vision="pieces", connector="frozen", language="frozen"))
        model(batch).nll.sum().backward()
        weights = adapters.adapter_parameters(part)
        assert {row.part for row in table.rows if row.trainable} == {"vision_lora"}
        with torch.no_grad():
            for name, weight in weights.items():
                assert inside(name, part.blocks[:1])
                if ".lora_B." in name:
                    assert weight.grad is not None
                    weight += 0.1
            assert any(float(w.grad.abs().max()) > 0 for w in weights.values() if w.grad is not None)
        model.train(False)
        with torch.no_grad():
            adapted = model(batch).nll
            with model.adapters_off():
                off = model(batch).nll
            with model.adapters_merged():
                merged = model(batch).nll
        assert torch.equal(off, plain) and not torch.equal(adapted, plain)
        assert torch.allclose(merged, adapted, rtol=1e-3, atol=1e-4)
        assert {k: v for k, v in frozen_fingerprint(model).items() if k != "vision_lora"} == before
        keys = model.trained_state()["vision_adapter"].tensors
        assert keys and all(k.startswith(f"base_model.model.{part.prefix}") for k in keys)
    finally:
        undo(native)


def test_where_adapters_would_go_is_known_without_weights(native: Native) -> None:
    empty = empty_parts(ModelConfig.model_validate({"native": {"name_or_path": str(native.folder)}}))

    for name, part in native.model.parts().items():
        where = Selector(("all-linear",), "last-1")
        assert (part.blocks, part.prefix) == (empty[name].blocks, empty[name].prefix) and part.blocks
        assert resolve_targets(empty[name], where, 2) == resolve_targets(part, where, 2)


def undo(native: Native) -> None:
    native.__init__(native.folder)  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("family", sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
def test_the_templates_beside_the_real_checkpoints_give_the_processors_ids(family: Any, tmp_path: Path) -> None:
    """Each class with the chat template that its checkpoints have on the hub."""
    folder = tiny_native(tmp_path, family)
    shutil.copy(TEMPLATES / f"{family}.jinja", folder / "chat_template.jinja")
    processor = processor_of(LlmConfig(name_or_path=str(folder), precision="fp32"))
    text = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    assert processor.chat_template == text

    if family == "llava":  # it writes no end token
        with pytest.raises(UserError, match=r"nothing would teach the model to stop.*llava_1_5\.jinja is what"):
            laid_out_by(processor, text)
        encoder = laid_out_by(processor, LLAVA_AS_TRAINED.read_text(encoding="utf-8"))
        encoded = encoder.encode(Example("0", (ImageRef("", "0"),), turns(TALKS[2])), [PICTURES[2]])
        said = encoder.tokenizer.decode(encoded.ids[encoded.supervise])
        assert said == "".join(f" {t.text}<|im_end|>" for t in turns(TALKS[2]) if t.role == "assistant")
        assert encoder.tokenizer.decode(encoded.ids).startswith("USER: <image>")
        return
    check_same_ids(laid_out_by(processor, text))


def laid_out_by(processor: NativeProcessor, template: str) -> ChatEncoder:
    return ChatEncoder(
        processor.processor.tokenizer, num_visual_tokens=None, max_seq_len=4096, template="chat", instruction="",
        instruction_multi="", images=processor, chat_template=template,
    )  # fmt: skip


def test_a_class_that_cannot_be_is_refused_with_the_reason() -> None:
    from types import SimpleNamespace

    with pytest.raises(UserError, match=r"'paligemma', which is not known \(it has no conversations"):
        known_family(SimpleNamespace(model_type="paligemma"), "x")


def test_a_class_that_is_not_known_is_refused_with_those_that_are(tiny_parts: TinyParts) -> None:
    with pytest.raises(UserError, match=r"is of the class 'qwen3', which is not known; known are qwen3_vl"):
        load_native(LlmConfig(name_or_path=str(tiny_parts.llm)), CPU)


def test_a_processor_whose_ids_differ_is_refused_with_the_first_difference(qwen: Native) -> None:
    own = qwen.processor.processor
    encoder = encoder_of(qwen.model, qwen.tokenizer)
    check_same_ids(encoder)
    kept = own.chat_template
    own.chat_template = kept.replace("<|vision_end|>", "<|vision_end|> ")
    try:
        with pytest.raises(UserError, match=r"from position \d+ on .*it gives '.*' \(ids .*\), ours are '.*'"):
            check_same_ids(encoder)
    finally:
        own.chat_template = kept


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("nan", r"NaN or infinite weights in .*visual\.merger"),
        ("missing", r"weights the model needs and the files lack: .*visual\.merger"),
        ("extra", r"weights the files hold and the model has no place for: .*vision_ln"),
        ("pickle", r"has no model\.safetensors, only pytorch_model\.bin"),
        ("processor", r"its processor cannot be loaded"),
    ],
)
def test_files_that_do_not_fit_are_refused(qwen: Native, tmp_path: Path, spoil: str, told: str) -> None:
    folder = tmp_path / "native"
    shutil.copytree(qwen.folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(k for k in weights if "visual.merger" in k and k.endswith("weight"))
    match spoil:
        case "nan":
            weights[name].view(-1)[0] = float("nan")
        case "missing":
            del weights[name]
        case "extra":
            weights["vision_ln.weight"] = torch.zeros(4)
        case "processor":
            (folder / "preprocessor_config.json").unlink()
            (folder / "processor_config.json").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if spoil == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=told):
        load_native(LlmConfig(name_or_path=str(folder), precision="fp32"), CPU)


def test_an_adapter_is_no_model(qwen: Native, tmp_path: Path) -> None:
    shutil.copytree(qwen.folder, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="PEFT adapter"):
        load_native(LlmConfig(name_or_path=str(tmp_path / "a")), CPU)


def test_an_image_that_the_processor_refuses_is_a_named_reject(qwen: Native, tmp_path: Path) -> None:
    Image.new("RGB", (300, 1)).save(tmp_path / "long.png")
    pipeline = NativePipeline(qwen.processor, 50)
    encoder = encoder_of(qwen.model, qwen.tokenizer, size_of=pipeline.size)
    example = Example("a", (ImageRef(str(tmp_path), "long.png"),), turns(TALKS[0]), file="test")
    builder = SampleBuilder(encoder, pipeline, None, on_bad_image="skip")

    with pytest.raises(EncodeError, match=r"a.*: image 1 is 300 x 1, which the model's own processor refuses: .*200"):
        encoder.encode(example)
    ((name, why),) = builder.batch([example], Layout(False, 4096, 8)).rejected
    assert name == "a" and why.startswith("cannot_encode: ")


def test_a_config_that_names_no_image_token_is_refused(qwen: Native) -> None:
    from transformers import PreTrainedConfig

    with pytest.raises(UserError, match=r"its config\.json names no image token \(image_token_id is None"):
        load_processor(LlmConfig(name_or_path=str(qwen.folder)), PreTrainedConfig(), torch.float32)


@pytest.mark.parametrize(
    ("file", "setting", "value", "told"),
    [
        ("config", "text_config.num_hidden_layers", 10_000_000, "num_hidden_layers 10000000; no model has"),
        ("config", "vision_config.depth", 10_000_000, "depth 10000000; no model has"),
        ("config", "vision_config.depth", 3000, "depth 3000 .* have 4 layers at most"),
        ("config", "vision_config.temporal_patch_size", 1_000_000,
         r"describes 6,144,\d+,\d+ weights, .* none like .*patch_embed.proj.weight \[32, 3, 1000000, 8, 8\]"),
        ("config", "text_config.vocab_size", 10**9, r"none like .*embed_tokens.weight \[1000000000, 64\]"),
        ("config", "image_token_id", 5, r"images stand at token 5 \(image_token_id\), but its processor writes"),
        ("preprocessor_config", "patch_size", 0, r"patch_size is 0, expected 8 \(patch_size in config.json\)"),
        ("preprocessor_config", "merge_size", 0, r"merge_size is 0, expected 2 \(spatial_merge_size in config.json\)"),
        ("preprocessor_config", "temporal_patch_size", 1_000_000, "temporal_patch_size is 1000000, expected 2"),
        ("preprocessor_config", "image_mean", [float("nan")] * 3, "image_mean is .*nan.*, expected finite numbers"),
        ("preprocessor_config", "image_std", [0, 1, 1], "image_std is .*, expected finite numbers, not 0"),
        ("preprocessor_config", "size", {"shortest_edge": 0, "longest_edge": 0},
         r"model\.native\.name_or_path .* its processor \(Qwen3VLProcessor\) fails on a made-up image: ValueError"),
    ],
)  # fmt: skip
def test_settings_that_no_model_has_are_told_before_anything_of_that_size_is_built(
    qwen: Native, tmp_path: Path, file: str, setting: str, value: Any, told: str
) -> None:
    shutil.copytree(qwen.folder, tmp_path / "native")
    path = tmp_path / "native" / f"{file}.json"
    content = json.loads(path.read_text())
    *sections, last = setting.split(".")
    inner = content
    for section in sections:
        inner = inner[section]
    inner[last] = value
    path.write_text(json.dumps(content))

    with pytest.raises(UserError, match=told) as caught:
        load_native(LlmConfig(name_or_path=str(path.parent), precision="fp32"), CPU)
    assert "model.llm" not in str(caught.value)


def test_what_fails_inside_a_native_model_names_its_setting() -> None:
    with (
        pytest.raises(UserError, match=r"model\.native\.name_or_path 'x': the model \(Linear\) fails .*ZeroDivision"),
        running("x", torch.nn.Linear(1, 1), "the model"),
    ):
        1 // 0  # noqa: B018
