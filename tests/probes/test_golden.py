from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from beholder.probes import golden, golden_history, written
from beholder.probes.written import Written
from beholder.runs import to_json
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError


def example(id: str, text: str, image: str) -> Example:
    turns = (Turn("user", (ImageSlot(0), "Say it:")), Turn("assistant", (text,)))
    return Example(id, (ImageRef("/data", image),), turns)


HELD_OUT = [example(f"s{k}", f"A picture of {k} on white.", f"{k}.png") for k in range(24)]


def make(path: Path, examples: Sequence[Example] = HELD_OUT, size: int = 7, seed: int = 123):
    buckets = [("short", "medium", "long")[k % 3] for k in range(len(examples))]
    return golden.golden_set(path, examples, buckets=buckets, label_len=range(len(examples)), size=size, seed=seed)


def step(*texts: str, ids: str = "abcdefgh") -> list[golden.GoldenCaption]:
    items = [golden.GoldenItem(id, "short", f"gt {id}", f"{id}.png", 3) for id in ids[: len(texts)]]
    records = [Written(i.id, i.gt_text, t, "correct", 1) for i, t in zip(items, texts, strict=True)]
    return golden.join(items, records)


def write(run: Path, number: int, *texts: str, ids: str = "abcdefgh") -> Path:
    rows = step(*texts, ids=ids)
    path = golden.captions_path(run / "qual", number, len(rows))
    golden.save(path, rows)
    return path


def printed(show: Callable[[Console], object]) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=200))
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Choosing


@given(st.lists(st.sampled_from(["short", "medium", "long"]), max_size=80), st.integers(0, 64), st.integers(0, 3))
def test_the_choice_is_balanced_deterministic_and_of_the_size_asked_for(buckets: list[str], size: int, seed: int):
    chosen = golden.choose(buckets, size, seed)

    assert len(chosen) == len(set(chosen)) == min(size, len(buckets))
    assert set(chosen) <= set(range(len(buckets)))
    assert chosen == golden.choose(list(buckets), size, seed)
    have, got = Counter(buckets), Counter(buckets[i] for i in chosen)
    most = max(got.values(), default=0)
    for bucket, available in have.items():  # a bucket has fewer than the others only when it has no more
        assert got[bucket] >= most - 1 or got[bucket] == available


def test_sixty_four_of_three_buckets_are_21_21_22():
    buckets = [("short", "medium", "long")[i % 3] for i in range(600)]

    counts = Counter(buckets[i] for i in golden.choose(buckets, 64, 123))

    assert sorted(counts.values()) == [21, 21, 22]


def test_another_seed_chooses_others():
    assert golden.choose(["all"] * 200, 32, 1) != golden.choose(["all"] * 200, 32, 2)


def test_questions_are_balanced_over_what_they_ask_before_length():
    kinds = ["colour"] * 100 + ["count"] * 100 + ["OCR"] * 3
    buckets = ["short" if k % 10 else "long" for k in range(203)]

    chosen = golden.choose(buckets, 43, 5, kinds)

    assert Counter(kinds[i] for i in chosen) == {"colour": 20, "count": 20, "OCR": 3}
    assert Counter(buckets[i] for i in chosen if kinds[i] == "colour") == {"short": 10, "long": 10}
    assert chosen == golden.choose(buckets, 43, 5, kinds)


# ---------------------------------------------------------------------------------------------------------------
# Persisting


def test_a_set_of_questions_says_what_is_asked_and_of_which_kind(tmp_path: Path):
    asked = ("What colour is it?", "How many are there?")
    examples = [
        replace(e, turns=(Turn("user", (ImageSlot(0), "\n", asked[k % 2])), e.turns[1])) for k, e in enumerate(HELD_OUT)
    ]
    path = tmp_path / "golden.jsonl"
    settings: dict[str, Any] = {"buckets": ["short"] * 24, "label_len": range(24), "size": 6, "seed": 1}

    items = golden.golden_set(path, examples, **settings, by_category=True)
    rows = golden.join([i for _, i in items], [Written(i.id, i.gt_text, "x", "correct", 1) for _, i in items])
    golden.save(golden.captions_path(tmp_path / "qual", 3, 6), rows)
    told = printed(golden_history.show_step(tmp_path, 3).print)

    assert Counter(i.category for _, i in items) == {"colour": 3, "count": 3}
    assert {(i.category, i.prompt_text) for _, i in items} == {("colour", asked[0]), ("count", asked[1])}
    assert golden.golden_set(path, examples, **settings, by_category=True) == items
    assert golden.load_captions(golden.captions_path(tmp_path / "qual", 3, 6)) == rows
    assert "category" in told and "How many are there?" in told


def test_a_file_of_questions_without_their_kind_is_read(tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    make(path)

    items = golden.load(path)

    assert {(i.category, i.prompt_text) for i in items} == {("", "")}


def test_the_set_is_chosen_once_and_read_back_for_ever(tmp_path: Path):
    path = tmp_path / "deep" / "golden.jsonl"

    first = make(path)
    stored = path.read_bytes()
    again = make(path, size=20, seed=999)  # the file wins over the settings

    assert first == again
    assert len(first) == 7
    assert path.read_bytes() == stored
    for index, item in first:
        assert item == golden.describe(HELD_OUT[index], ("short", "medium", "long")[index % 3], index)
    assert set(json.loads(stored.splitlines()[0])) == {"id", "bucket", "gt_text", "image_relpath", "label_len"}


def test_the_text_of_a_conversation_is_the_answer_that_is_captioned(tmp_path: Path):
    first = example("s", "red", "0.png")
    talk = replace(first, turns=(*first.turns, Turn("user", ("Is it round?",)), Turn("assistant", ("no",))))
    path = tmp_path / "golden.jsonl"

    [(_, item)] = make(path, [talk], size=1)

    assert item.gt_text == "no"
    assert make(path, [first, talk]) == [(1, item)]


def test_the_file_is_followed_when_the_held_out_samples_come_in_another_order(tmp_path: Path):
    first = make(tmp_path / "golden.jsonl")

    again = make(tmp_path / "golden.jsonl", list(reversed(HELD_OUT)))

    assert [item for _, item in again] == [item for _, item in first]
    assert [index for index, _ in again] == [23 - index for index, _ in first]


def test_samples_that_do_not_match_are_named_each_with_why(tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    a, b, c, d, *rest = [index for index, _ in make(path)]
    changed = list(HELD_OUT)
    changed[b] = example(f"s{b}", "another text", f"{b}.png")
    changed[c] = replace(HELD_OUT[c], images=(ImageRef("/data", "other.png"),))
    changed[d] = example(f"s{d}", "another text", "other.png")
    changed[a] = example("new", "new", "new.png")

    with pytest.raises(UserError) as e:
        make(path, changed)

    assert "4 of 7 golden samples do not match" in str(e.value)
    assert f"'s{a}' (absent), 's{b}' (other text), 's{c}' (other image), 's{d}' (other text and other image)." in str(
        e.value
    )
    assert "golden_set_path" in str(e.value)
    assert all(f"'s{k}'" not in str(e.value) for k in rest)


def test_the_nearest_of_samples_with_one_id_says_why(tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    golden.save(path, [golden.GoldenItem("x", "short", "text", "a.png", 1)])

    with pytest.raises(UserError, match=r"'x' \(other image\)\."):
        make(path, [example("x", "far", "far.png"), example("x", "text", "b.png")])


def test_twenty_samples_are_named_and_the_others_counted(tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    make(path, size=24)

    with pytest.raises(UserError, match=r"24 of 24 .*'s19' \(absent\) and 4 more\.") as e:
        make(path, [example("x", "y", "z")])

    assert "'s20'" not in str(e.value)


def test_equal_records_keep_their_places(tmp_path: Path):
    twins = [example("same", "a cat", "cat.png")] * 3

    first = make(tmp_path / "golden.jsonl", twins, size=3)

    assert [index for index, _ in first] == [0, 1, 2]
    assert make(tmp_path / "golden.jsonl", twins) == first


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_a_file_without_samples_is_an_error_that_says_what_to_do(tmp_path: Path, content: str):
    path = tmp_path / "golden.jsonl"
    path.write_text(content)

    with pytest.raises(UserError, match=r"golden\.jsonl: no golden sample in it.*delete the file"):
        make(path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", r"golden\.jsonl:2: not valid JSON"),
        ('{"id": "a"}', r"golden\.jsonl:2: expected the fields .*gt_text \(str\).*got id \(str\)"),
        ("[1]", r"golden\.jsonl:2: .*got list"),
        (
            '{"id": "a", "bucket": "b", "gt_text": "c", "image_relpath": "d", "label_len": "e"}',
            r"label_len \(int\).*got.*label_len \(str\)",
        ),
    ],
)
def test_a_malformed_file_names_its_line(tmp_path: Path, line: str, match: str):
    path = tmp_path / "golden.jsonl"
    golden.save(path, [golden.GoldenItem("a", "b", "c", "d", 1)])
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(UserError, match=match):
        golden.load(path)


# ---------------------------------------------------------------------------------------------------------------
# Captions of a step


def test_the_captions_of_a_step_are_written_with_the_seeds_fields_and_read_back(bench: Any, tmp_path: Path):
    chosen = make(tmp_path / "golden.jsonl", bench.held_out)
    records = written.write(bench.model, bench.encoder, bench.builder, [bench.held_out[i] for i, _ in chosen])
    path = golden.captions_path(tmp_path / "qual", step=40, size=len(chosen))

    rows = golden.join([item for _, item in chosen], records)
    golden.save(path, rows)

    assert path.name == "step_40_golden7.jsonl"
    assert golden.load_captions(path) == rows
    line = json.loads(path.read_bytes().splitlines()[0])
    assert list(line) == [
        "id", "bucket", "gt_text", "pred_text", "image_relpath", "label_len", "pred_tokens_len", "hash",
    ]  # fmt: skip
    assert line["hash"] == hashlib.sha256(line["pred_text"].encode()).hexdigest()[:16]


def test_captions_of_samples_with_one_id_stay_in_their_order():
    items = [golden.GoldenItem("same", "short", text, f"{text}.png", 3) for text in ("one", "two")]
    records = [Written("same", text, text.upper(), "correct", 1) for text in ("one", "two")]

    assert [(r.gt_text, r.pred_text) for r in golden.join(items, records)] == [("one", "ONE"), ("two", "TWO")]


def test_a_sample_without_a_caption_is_left_out_and_a_strange_caption_is_our_own_error():
    items = [golden.GoldenItem(id, "short", "gt", "p.png", 3) for id in "ab"]

    assert [r.id for r in golden.join(items, [Written("b", "gt", "x", "correct", 1)])] == ["b"]
    with pytest.raises(AssertionError, match=r"not in the golden set.*'c'"):
        golden.join(items, [Written("c", "gt", "x", "correct", 1)])


# ---------------------------------------------------------------------------------------------------------------
# Reading a run


def test_steps_are_found_in_the_order_of_their_numbers_and_other_files_are_not_steps(tmp_path: Path):
    for number in (1000, 80, 160):
        write(tmp_path, number, "x", "y")
    for name in ("step_240_captions1200.jsonl", "step_80_golden.jsonl", "step_x_golden2.jsonl", "notes.txt"):
        (tmp_path / "qual" / name).write_text("{}")

    assert [step for step, _ in golden_history.steps_of(tmp_path / "qual")] == [80, 160, 1000]
    assert golden_history.steps_of(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("asked", "got"), [("first", 80), ("last", 1000), (160, 160), ("160", 160), ("0080", 80)])
def test_a_step_is_a_number_or_first_or_last(tmp_path: Path, asked: int | str, got: int):
    for number in (1000, 80, 160):
        write(tmp_path, number, f"at {number}")

    run = golden_history.read_run(tmp_path)

    assert run.resolve(asked) == got
    assert run.captions(asked)[0].pred_text == f"at {got}"


@pytest.mark.parametrize("asked", [81, "81", "latest", "-80", "", "8²"])
def test_an_unknown_step_names_the_steps_there_are(tmp_path: Path, asked: int | str):
    for number in (1000, 80):
        write(tmp_path, number, "x")

    with pytest.raises(UserError, match=r"no golden captions of step .*there are steps 80, 1000 .*first, last"):
        golden_history.show_step(tmp_path, asked)


def test_of_sets_of_two_sizes_the_one_with_more_steps_is_read(tmp_path: Path):
    write(tmp_path, 10, "a")
    write(tmp_path, 20, "b")
    write(tmp_path, 20, "x", "y", "z")

    run = golden_history.read_run(tmp_path)

    assert list(run.files) == [10, 20]
    assert [c.pred_text for c in run.captions("last")] == ["b"]


def test_a_folder_without_golden_captions_says_which_settings_make_them(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such folder"):
        golden_history.read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no golden captions .*eval\.golden_size.*run_golden_every"):
        golden_history.read_run(tmp_path)


def test_a_step_file_without_captions_is_named(tmp_path: Path):
    write(tmp_path, 10, "x").write_text("")

    with pytest.raises(UserError, match=r"step_10_golden1\.jsonl: no caption in it"):
        golden_history.show_step(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Differences


def test_the_difference_of_two_steps_names_the_words_that_changed():
    rows = golden_history.diff(
        step("a red circle", "same", "a cat on a mat", ""), step("a blue circle", "same", "a cat", "a dog")
    )

    assert [(r.before.id, r.status, r.removed, r.added) for r in rows] == [
        ("a", "changed", ("red",), ("blue",)),
        ("b", "same", (), ()),
        ("c", "changed", ("on", "a", "mat"), ()),
        ("d", "changed", (), ("a", "dog")),
    ]


@given(st.text(st.sampled_from("ab \n"), max_size=20), st.text(st.sampled_from("ab \n"), max_size=20))
def test_taking_words_away_and_adding_words_makes_one_caption_of_the_other(before: str, after: str):
    (row,) = golden_history.diff(step(before), step(after))

    assert Counter(before.split()) - Counter(row.removed) + Counter(row.added) == Counter(after.split())
    assert (row.status == "same") == (before == after)
    assert before.split() != after.split() or row.removed == row.added == ()


def test_different_sets_cannot_be_compared_and_the_samples_are_named():
    with pytest.raises(UserError, match=r"different golden sets \('c' only before\)"):
        golden_history.diff(step("x", "y", "z"), step("x", "y"))
    with pytest.raises(UserError, match=r"the order differs"):
        golden_history.diff(step("x", "y", ids="ab"), step("x", "y", ids="ba"))


def test_the_difference_is_printed_with_marks_that_need_no_colour_and_a_summary(tmp_path: Path):
    write(tmp_path, 80, "a cat", "A cat!", "gt c", "", "x  y")
    write(tmp_path, 240, "gt a", "A cat!", "gt c", "gt d", "x y")

    found = golden_history.diff_steps(tmp_path, "first", "last")
    text = printed(found.print)

    assert "{+gt+} a [-cat-]" in text
    assert "(was empty) {+gt+} {+d+}" in text
    assert "x y (spacing changed)" in text
    assert "A cat!" not in text  # the same at both
    assert "step 80 → 240: changed 3 of 5 · exact matches 1 → 3 · near-identical captions 2 → 1 (references 1)" in text


def test_the_difference_as_json_has_every_picture_and_the_sums(tmp_path: Path):
    write(tmp_path, 80, "a cat", "a dog")
    write(tmp_path, 240, "gt a", "a dog")

    told = json.loads(to_json(golden_history.diff_steps(tmp_path, 80, "240").to_json()))

    assert (told["steps"], told["pictures"], told["changed"]) == ([80, 240], 2, 1)
    assert (told["exact_matches"], told["near_identical"]) == ([0, 1], [1, 1])
    assert told["rows"] == [
        {"id": "a", "bucket": "short", "image": "a.png", "reference": "gt a", "status": "changed", "before": "a cat",
         "after": "gt a", "removed": ["cat"], "added": ["gt"]},
        {"id": "b", "bucket": "short", "image": "b.png", "reference": "gt b", "status": "same", "before": "a dog",
         "after": "a dog", "removed": [], "added": []},
    ]  # fmt: skip


def test_two_equal_steps_have_no_table(tmp_path: Path):
    write(tmp_path, 80, "a cat")

    text = printed(golden_history.diff_steps(tmp_path, 80, 80).print)

    assert text.startswith("step 80 → 80: changed 0 of 1")


def test_a_step_is_shown_with_references_matches_and_symptoms(tmp_path: Path):
    write(tmp_path, 80, "gt a", "", "the cat and the cat and the cat", "[red]x[/red]\x1b[31m")

    found = golden_history.show_step(tmp_path, "last")
    text = printed(found.print)

    assert [r["id"] for r in found.to_json()] == ["a", "b", "c", "d"]
    assert "exact matches 1 of 4" in text
    assert "empty 1 of 4 (25%, 95 % interval 5% to 70%): b" in text
    assert "loop 1 of 4" in text
    assert "[red]x[/red]" in text  # never markup
    assert "\x1b" not in text
    assert "(empty)" in text
