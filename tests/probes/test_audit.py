from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.collate import Layout
from beholder.evidence import Measurement
from beholder.probes import audit, loss, wrong_images
from beholder.probes.audit import Audit
from beholder.types import Batch, Example, ImageRef, ImageSlot, TokenLosses, Turn

VOCAB = 320
PADDED = Layout(packing=False, pack_len=512, pad_to_multiple_of=8)
PACKED = Layout(packing=True, pack_len=600, pad_to_multiple_of=8)


class InContextReader:
    """A language model that knows nothing but what the conversation has said so far: a 4-gram model of the sample's
    own text, backed off to shorter ones and to even odds. It reads well and has never seen an image."""

    training = False

    def __init__(self) -> None:
        self.images_shown = 0

    def train(self, mode: bool = True) -> object:
        return self

    def __call__(self, batch: Batch, /) -> TokenLosses:
        self.images_shown += len(batch.images) + batch.image_positions.shape[0]
        nll, owner, correct = [], [], []
        for row, t in torch.nonzero(batch.supervise).tolist():
            start = t - int(batch.position_ids[row, t])
            said = batch.input_ids[row, start:t].tolist()
            odds = self.odds(said)
            target = int(batch.input_ids[row, t])
            nll.append(-math.log(odds[target]))
            owner.append(int(batch.sample_index[row, t]))
            correct.append(bool(odds.argmax() == target))
        return TokenLosses(torch.tensor(nll), torch.tensor(owner), torch.tensor(correct))

    @staticmethod
    def odds(said: Sequence[int]) -> np.ndarray:
        odds = np.full(VOCAB, 1 / VOCAB)
        for order in range(4):
            seen = Counter(said[k] for k in range(order, len(said)) if said[k - order : k] == said[len(said) - order :])
            if seen:
                counts = np.bincount(list(seen.elements()), minlength=VOCAB)
                odds = 0.2 * odds + 0.8 * counts / counts.sum()
        return odds


COLOURS = ["red", "green", "blue", "yellow", "pink", "brown", "cyan", "violet"]
SHAPES = ["square", "disc", "triangle", "star", "cross"]


def talk(id: str, *rounds: tuple[str, str], image: str | None = None) -> Example:
    turns: list[Turn] = []
    for k, (question, answer) in enumerate(rounds):
        turns.append(Turn("user", (ImageSlot(0), "\n", question) if k == 0 else (question,)))
        turns.append(Turn("assistant", (answer,)))
    return Example(id, (ImageRef("root", image or id),), tuple(turns), file="records.jsonl")


def leaky(num: int = 60) -> list[Example]:
    """The second answer says what the first one said."""
    draw = np.random.default_rng(0)
    return [
        talk(str(k), ("What colour is it?", f"It is {c}."), ("Is it big?", "no"), ("Say the colour.", f"It is {c}."))
        for k, c in enumerate(draw.choice(COLOURS, num).tolist())
    ]


def honest(num: int = 60) -> list[Example]:
    """The same form, but no answer tells another."""
    draw = np.random.default_rng(0)
    pairs = zip(draw.choice(COLOURS, num).tolist(), draw.choice(SHAPES, num).tolist(), strict=True)
    return [
        talk(str(k), ("What colour is it?", f"It is {c}."), ("Which shape is it?", f"It is a {s}."))
        for k, (c, s) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def encoder(bench: Any) -> ChatEncoder:
    return ChatEncoder(
        bench.tokenizer, num_visual_tokens=4, max_seq_len=256, template="conversation", instruction="Say it:",
        instruction_multi="Say each:",
    )  # fmt: skip


def run(encoder: ChatEncoder, examples: Sequence[Example], num_turns: int = 128, **more: Any) -> Audit:
    return audit.audit(InContextReader(), encoder, PADDED, examples, num_turns, content_key=str, **more)


def named(found: Audit) -> dict[str, Measurement]:
    return {m.key: m for m in found.measurements}


# ---------------------------------------------------------------------------------------------------------------
# What it finds


def test_turns_that_repeat_earlier_turns_are_named_as_leakage(encoder: ChatEncoder):
    found = run(encoder, leaky())

    leak = named(found)["audit.leak"]
    assert leak.ci95 is not None and leak.ci95[0] > audit.LEAK
    [finding] = found.findings
    assert finding.startswith("Leakage: later turns can be answered from earlier turns' text")
    assert f"{leak.value:.2f} nats/token" in finding and f"n={leak.n}" in finding
    assert "one question a sample" in finding


def test_a_group_that_leaks_is_told_from_one_that_does_not(encoder: ChatEncoder):
    m = named(run(encoder, leaky(), num_turns=180))

    say, big = m["audit.leak/say the"], m["audit.leak/is it"]
    assert say.ci95 is not None and say.ci95[0] > 0.3 and say.by == "question"
    assert big.ci95 is not None and big.ci95[0] <= 0 <= big.ci95[1]
    assert m["audit.leak/other answers"].by == "answer"


def test_the_share_of_answers_that_earlier_turns_give_away_is_told_apart_from_what_the_question_does(
    encoder: ChatEncoder,
):
    clear = [c for c in COLOURS if c != "yellow"] * 4  # its "ell" also stands in "Spell"
    examples = [talk(str(k), ("Spell it.", c), ("Spell it.", c)) for k, c in enumerate(clear)]

    found = run(encoder, examples)

    alone, context = (named(found)[f"audit.answerable.{view}"] for view in ("alone", "context"))
    assert (alone.value, alone.n) == (0, 2 * len(clear))
    assert (context.value, context.n) == (1, len(clear))  # first turns have no earlier ones
    assert {t.turn for t in found.turns if t.answered_in_context} == {1}


def test_earlier_turns_that_only_teach_the_form_are_no_leakage(encoder: ChatEncoder):
    found = run(encoder, honest())

    leak, m = named(found)["audit.leak"], found.turns
    assert leak.ci95 is not None and leak.ci95[0] <= 0.02
    assert found.findings == []
    later = [t for t in m if t.turn > 0]
    # Form alone makes the answer far cheaper: this is what the control is for.
    assert sum(t.context_nll for t in later) < 0.8 * sum(t.alone_nll for t in later)


def test_questions_that_tell_their_answer_are_named(encoder: ChatEncoder):
    examples = [talk(str(k), (f"echo {c}\n{c}\n{c}\n{c}", c)) for k, c in enumerate(COLOURS * 4)]
    examples += [talk(f"n{k}", ("Which shape is it?", s)) for k, s in enumerate(SHAPES * 5)]

    found = run(encoder, examples)

    m = named(found)
    assert not any(x.name == "audit.leak" for x in found.measurements)  # single questions
    assert m["audit.answerable.alone/which shape"].value == 0
    assert not any(x.name == "audit.answerable.context" for x in found.measurements)
    assert found.gaps == []
    [finding] = found.findings
    assert finding.startswith("Answerable without the image")
    assert "which shape" not in finding


# ---------------------------------------------------------------------------------------------------------------
# What is scored


def test_no_image_reaches_the_model(encoder: ChatEncoder):
    reader = InContextReader()

    audit.audit(reader, encoder, PACKED, leaky(8), 16, content_key=str)
    audit.text_losses(reader, encoder, PACKED, leaky(8))

    assert reader.images_shown == 0


def test_context_is_the_whole_earlier_conversation_and_control_another_image(encoder: ChatEncoder):
    examples = leaky(20) + [replace(e, id=f"copy{e.id}") for e in leaky(20)]  # the same images once more
    by_id = {e.id: e for e in examples}
    reader = InContextReader()
    [*whole] = loss.sample_losses(
        reader,
        audit._batches([(e.id, encoder.encode(audit.without_images(e))) for e in examples], PADDED, 8),
    )
    turn_nll = {
        x.id: [math.fsum(x.token_nll[stop - n : stop - 1]) for n, stop in zip(x.turns, np.cumsum(x.turns), strict=True)]
        for x in whole
    }

    found = run(encoder, examples, num_turns=90)

    for t in found.turns:
        assert t.context_nll == pytest.approx(turn_nll[t.id][t.turn])  # its turn within the conversation, end token out
        assert t.tokens == len(t.answer.encode())
        assert (t.control_nll is None) == (t.turn == 0) == (t.controls == ())
        if t.turn == 0:
            assert (t.alone_nll, t.answered_alone) == (t.context_nll, t.answered_in_context)
        assert all(by_id[c].images != by_id[t.id].images for c in t.controls)
        assert len(set(t.controls)) == len(t.controls) == (audit.CONTROLS if t.turn else 0)


def test_the_turns_are_spread_over_samples_and_positions_and_depend_on_the_seed_alone(encoder: ChatEncoder):
    few = run(encoder, leaky(60), num_turns=48)
    more = run(encoder, leaky(60), num_turns=100)

    assert len(few.turns) == 48 and len({t.id for t in few.turns}) == 48
    assert {t.turn for t in few.turns} == {0, 1, 2}
    assert len(more.turns) == 100 and len({t.id for t in more.turns}) == 60
    assert len({(t.id, t.turn) for t in more.turns}) == 100
    assert run(encoder, leaky(60), num_turns=48) == few
    assert run(encoder, leaky(60), num_turns=48, seed=1).turns != few.turns


def test_the_layout_does_not_change_the_scores(encoder: ChatEncoder, bench: Any):
    one, other = (
        audit.audit(bench.model, encoder, layout, leaky(12), 24, batch_size=size, content_key=str)
        for layout, size in ((PADDED, 1), (PACKED, 16))
    )

    for a, b in zip(one.turns, other.turns, strict=True):
        assert (a.id, a.turn, a.tokens, a.controls) == (b.id, b.turn, b.tokens, b.controls)
        # fp32 products in other shapes: worst measured 2e-7 relative
        assert (a.alone_nll, a.context_nll) == pytest.approx((b.alone_nll, b.context_nll), rel=5e-6)


def test_a_trained_model_is_audited_with_an_empty_image_in_every_place(encoder: ChatEncoder, sighted: Any):
    seen: list[tuple[int, int]] = []

    class Watched:
        training = False

        def train(self, mode: bool = True) -> object:
            return self

        def __call__(self, batch: Batch, /) -> TokenLosses:
            assert all(image is blank for image in batch.images)
            seen.extend(Counter(batch.image_sample.tolist()).items())
            assert len(set(batch.image_sample.tolist())) == len(batch.ids)
            return sighted(batch)

    blank = wrong_images.blank_image(sighted, "zero")
    plain = audit.audit(sighted, encoder, PACKED, leaky(48), 48, content_key=str)
    found = audit.audit(Watched(), encoder, PACKED, leaky(48), 48, content_key=str, blank=blank, name="audit.trained")

    assert {number for _, number in seen} == {1}  # alone, in context and in control alike
    assert [(t.id, t.turn, t.tokens) for t in found.turns] == [(t.id, t.turn, t.tokens) for t in plain.turns]
    assert all(a.alone_nll != b.alone_nll for a, b in zip(found.turns, plain.turns, strict=True))
    assert {m.name for m in found.measurements} == {
        "audit.trained.answerable.alone", "audit.trained.answerable.context", "audit.trained.leak"
    }  # fmt: skip


def test_captions_are_audited_under_the_caption_template(bench: Any):
    found = audit.audit(bench.model, bench.encoder, PACKED, bench.held_out, 32)
    text = {x.id: x for x in audit.text_losses(bench.model, bench.encoder, PACKED, bench.held_out)}

    assert len(found.turns) == 32
    for t in found.turns:
        assert t.question == "Say it:"
        assert t.alone_nll == pytest.approx(sum(text[t.id].token_nll[:-1]), rel=5e-6)
    assert not any(m.name == "audit.leak" for m in found.measurements)


def test_text_losses_are_of_the_same_targets_and_do_not_know_the_image(bench: Any, sighted: Any):
    shuffled = wrong_images.shuffle_images(bench.held_out, str, 0)

    own = audit.text_losses(sighted, bench.encoder, PACKED, bench.held_out)
    other = audit.text_losses(sighted, bench.encoder, PADDED, shuffled, batch_size=5)
    right = loss.sample_losses(sighted, bench.batches()(bench.held_out))

    assert [x.nll for x in own] == pytest.approx([x.nll for x in other], rel=5e-6)
    assert [(x.id, x.turns) for x in own] == [(x.id, x.turns) for x in right]
    gain = loss.paired_gain(own, right, "learn.delta_text")
    assert gain.ci95 is not None and gain.ci95[0] > 0  # the image helps a model that looks


def test_images_and_their_line_breaks_leave_the_text_as_it_was():
    turns = (
        Turn("user", (ImageSlot(0), "\n", ImageSlot(1), "\n", "What\nis it?")), Turn("assistant", ("a\ndot",)),
        Turn("user", ("and <image>", ImageSlot(2))), Turn("assistant", ("no",)),
    )  # fmt: skip
    example = Example("a", tuple(ImageRef("r", str(k)) for k in range(3)), turns)

    plain = audit.without_images(example)

    assert plain.images == ()
    assert [t.parts for t in plain.turns] == [("What\nis it?",), ("a\ndot",), ("and <image>",), ("no",)]


def test_a_question_that_is_only_the_image_can_be_audited(encoder: ChatEncoder):
    examples = [
        Example(str(k), (ImageRef("r", str(k)),), (Turn("user", (ImageSlot(0),)), Turn("assistant", ("a dot",))))
        for k in range(3)
    ]

    assert [t.question for t in run(encoder, examples).turns] == ["", "", ""]


# ---------------------------------------------------------------------------------------------------------------
# What it cannot do


def test_answers_that_do_not_fit_are_left_out_and_told(encoder: ChatEncoder):
    long = talk("long", ("Tell all.", "word " * 100), ("What colour?", "red"))

    found = run(encoder, [*leaky(10), long])

    assert "long" not in {t.id for t in found.turns}
    assert any(gap.startswith("Leakage audit: 2 answers were left out") for gap in found.gaps)
    with pytest.raises(EncodeError, match="none of 1 samples has an answer that fits"):
        run(encoder, [long])


def test_later_turns_without_a_control_are_told(encoder: ChatEncoder):
    same = [talk(str(k), ("What colour?", "red"), ("Sure?", "yes"), image="one picture") for k in range(4)]

    found = run(encoder, same)

    assert all(t.control_nll is None for t in found.turns)
    assert "audit.leak" not in named(found)
    assert any("4 of 4 later turns have no control" in gap for gap in found.gaps)


@pytest.mark.parametrize(("num", "told"), [(19, False), (20, True)])
def test_a_leak_of_few_samples_is_not_told_but_how_many_there_were(encoder: ChatEncoder, num: int, told: bool):
    found = run(encoder, leaky(num))  # two later turns each: 38 turns of 19 samples are still 19 samples

    assert ("audit.leak" in named(found)) is told
    gap = [gap for gap in found.gaps if "19 of the samples that were scored have a later turn" in gap]
    assert len(gap) == (not told)
    assert told or ("expected 20 or more" in gap[0] and found.findings == [])


def test_a_group_is_told_when_enough_samples_have_it(encoder: ChatEncoder):
    chatty = [talk(f"c{k}", *[("Spell it.", c)] * 3) for k, c in enumerate(COLOURS)]  # 24 turns of 8 samples

    m = named(run(encoder, [*leaky(30), *chatty], num_turns=200))

    assert "audit.answerable.alone/say the" in m and "audit.leak/say the" in m
    assert not any(key.endswith("/spell it") for key in m)
    assert "audit.answerable.alone/what colour" in m and "audit.answerable.context/what colour" not in m


def test_a_chat_is_audited_in_its_own_format(bench: Any):
    encoder = ChatEncoder(
        bench.tokenizer, num_visual_tokens=4, max_seq_len=256, template="chat", instruction="", instruction_multi=""
    )
    turns = (
        Turn("user", (ImageSlot(0), "\nWhat colour is it?")), Turn("assistant", ("red",)),
        Turn("user", ("Is it round?",)), Turn("assistant", ("no",)),
    )  # fmt: skip
    examples = [replace(e, turns=turns) for e in bench.held_out[:6]]

    losses = audit.text_losses(bench.model, encoder, bench.padded, examples)
    found = audit.audit(bench.model, encoder, bench.padded, examples, 12)

    # One byte is one token here; the loss is over the end tokens too, the audit's is not.
    assert [x.turns for x in losses] == [(len("red") + 1, len("no") + 1)] * 6
    assert {(t.answer, t.tokens) for t in found.turns} == {("red", 3), ("no", 2)}
    words = encoder.encode(audit.without_images(examples[0]))
    assert words.image_spans == () and "<|im_start|>" in bench.tokenizer.decode(words.ids)
