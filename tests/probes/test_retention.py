from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from beholder.config import LoraConfig
from beholder.evidence import Measurement
from beholder.model import adapters
from beholder.probes import retention
from beholder.types import UserError

TEXTS = ["The capital of France is Paris.", "def f(x):\n    return x + 1\n", "12 + 7 = 19."]


@pytest.fixture
def adapted(bench: Any) -> Any:
    """A model with fresh adapters, which change nothing yet."""
    model = copy.deepcopy(bench.model)
    adapters.attach(model.language.part, LoraConfig(enable=True, r=4), seed=0)
    return model


def move(model: Any, size: float) -> None:
    """Give the adapters something to say."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.language.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=draw))


def keyed(rows: list[Measurement]) -> dict[str, Measurement]:
    return {m.name: m for m in rows}


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def test_fresh_adapters_keep_everything(adapted: Any, bench: Any):
    m = keyed(retention.measure(adapted, bench.tokenizer, TEXTS))

    assert m["retention.loss"].value == m["retention.loss_base"].value
    assert m["retention.loss_ratio"].value == 1 and m["retention.kl"].value == 0
    assert m["retention.loss"].n == len(TEXTS)


def test_loss_and_divergence_are_those_of_the_whole_logits(adapted: Any, bench: Any):
    move(adapted, 0.05)
    ids = torch.tensor([bench.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        on = adapted.text_logits(ids)[0, :-1].double().log_softmax(-1)
        with adapted.adapters_off():
            off = adapted.text_logits(ids)[0, :-1].double().log_softmax(-1)
    targets = ids[0, 1:, None]

    m = keyed(retention.measure(adapted, bench.tokenizer, TEXTS[:1]))

    # fp32 within a position; worst seen 3e-7.
    assert m["retention.loss"].value == pytest.approx(-float(on.gather(1, targets).mean()), abs=5e-6)
    assert m["retention.loss_base"].value == pytest.approx(-float(off.gather(1, targets).mean()), abs=5e-6)
    assert m["retention.kl"].value == pytest.approx(float((off.exp() * (off - on)).sum(1).mean()), abs=5e-6)
    assert m["retention.kl"].value > 1e-4


def test_corrected_for_style_the_first_tokens_of_a_text_do_not_count(
    adapted: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
):
    move(adapted, 0.05)
    ids = torch.tensor([bench.tokenizer(TEXTS[0])["input_ids"]])  # 32 tokens
    targets = ids[0, 1:, None]
    with torch.no_grad():
        on = -adapted.text_logits(ids)[0, :-1].double().log_softmax(-1).gather(1, targets)[:, 0]
        with adapted.adapters_off():
            off = -adapted.text_logits(ids)[0, :-1].double().log_softmax(-1).gather(1, targets)[:, 0]
    late = retention.STYLED - 1  # the place that predicts the token after the first STYLED

    for positions in (64, 5):
        monkeypatch.setattr(retention, "NUM_POSITIONS", positions)
        m = keyed(retention.measure(adapted, bench.tokenizer, [TEXTS[0], TEXTS[2]]))["retention.loss_ratio_styled"]
        assert m.value == pytest.approx(float(on[late:].sum() / off[late:].sum()), abs=5e-6)
        assert m.n == 1, "the other text has 12 tokens"
        assert "16 tokens" in (m.caveat or "")
    assert m.value != pytest.approx(float(on.sum() / off.sum()), abs=1e-4)
    assert "retention.loss_ratio_styled" not in keyed(retention.measure(adapted, bench.tokenizer, TEXTS[2:]))


def test_never_more_positions_at_the_head_than_stated_and_the_same_numbers(
    adapted: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
):
    move(adapted, 0.05)
    seen: list[int] = []
    head = type(adapted.language).head
    monkeypatch.setattr(type(adapted.language), "head", lambda self, h: seen.append(len(h)) or head(self, h))
    long = ["a long text " * 40]  # 480 bytes, each a token here

    whole = keyed(retention.measure(adapted, bench.tokenizer, long))
    most = max(seen)
    monkeypatch.setattr(retention, "NUM_POSITIONS", 7)
    parts = keyed(retention.measure(adapted, bench.tokenizer, long))

    assert most == 64
    for name, row in whole.items():
        assert parts[name].value == pytest.approx(row.value, rel=1e-5)  # other shapes, other rounding of fp32


def test_the_mode_and_the_adapters_are_as_before_afterwards(adapted: Any, bench: Any):
    move(adapted, 0.05)
    ids = torch.tensor([bench.tokenizer(TEXTS[0])["input_ids"]])
    before = adapted.text_logits(ids)
    adapted.train()

    retention.measure(adapted, bench.tokenizer, TEXTS)

    assert adapted.training
    assert torch.equal(adapted.train(False).text_logits(ids), before)


def test_a_spoiled_language_model_is_worse_than_its_base(sighted: Any, bench: Any):
    """The base was trained on captions, so it has something to lose."""
    model = copy.deepcopy(sighted)
    adapters.attach(model.language.part, LoraConfig(enable=True, r=4), seed=0)
    move(model, 0.5)

    m = keyed(retention.measure(model, bench.tokenizer, [e.target_text for e in bench.held_out[:12]]))

    ratio = m["retention.loss_ratio"]
    assert ratio.value > 1.5 and ratio.ci95 is not None and ratio.ci95[0] > 1
    assert ratio.value == pytest.approx(m["retention.loss"].value / m["retention.loss_base"].value)


def test_long_passages_are_read_up_to_a_limit_and_that_is_told(
    adapted: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retention, "MAX_TOKENS", 10)

    m = keyed(retention.measure(adapted, bench.tokenizer, TEXTS[:1]))

    assert "9 tokens of 1 texts; 1 of them read up to 10 tokens" in (m["retention.loss"].caveat or "")


def test_a_text_of_one_token_is_an_error_that_names_it(adapted: Any, bench: Any):
    with pytest.raises(UserError, match="'x' has 1 token"):
        retention.measure(adapted, bench.tokenizer, ["x"])


def test_a_base_outside_the_band_is_a_finding(adapted: Any, bench: Any):
    measured = retention.measure(adapted, bench.tokenizer, TEXTS)  # random weights guess evenly
    fine = [m.model_copy(update={"value": 3.0}) for m in measured]

    [told] = retention.findings(measured)

    assert measured[0].value > math.log(200)
    assert "weights, tokenizer or precision" in told
    assert retention.findings(fine) == []


# ---------------------------------------------------------------------------------------------------------------
# Texts


def test_the_own_texts_are_some_forty_different_passages_of_several_scripts_with_code():
    texts = retention.load_texts()

    assert 40 <= len(texts) == len(set(texts))
    assert sum("\n" in t for t in texts) >= 8  # code and dialogue
    assert any("def mean" in t and "\n    " in t for t in texts)
    assert any("%d\\n" in t for t in texts)  # a backslash of C is one
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in t) for t in texts) >= 2
    assert all(100 <= len(t) <= 700 or any(c > "\u3000" for c in t) for t in texts)


def test_a_users_texts_are_a_passage_a_line(tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("# my texts\n\nOne line.\na\\nb\\tc\\\\n\n", encoding="utf-8")

    assert retention.load_texts(path) == ["One line.", "a\nb\tc\\n"]


def test_a_file_without_passages_or_absent_is_an_error(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("# nothing\n")

    with pytest.raises(UserError, match="holds no passage"):
        retention.load_texts(tmp_path / "empty.txt")
    with pytest.raises(UserError, match=r"retention_path.*cannot be read"):
        retention.load_texts(tmp_path / "absent.txt")
