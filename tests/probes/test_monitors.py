"""The monitors on hand-made outputs whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from beholder.evidence import Measurement
from beholder.probes import monitors as probe
from beholder.probes.hallucination import load_objects, parse_objects
from beholder.probes.loss import SampleLoss
from beholder.types import UserError

SHAPES = parse_objects("square: box\ndisc: dot\ntriangle", "shapes")
PHRASE = probe.Phrase("无关图片")


def keyed(rows: list[Measurement]) -> dict[str, Measurement]:
    return {m.key: m for m in rows}


def described(texts: list[str], shows: list[list[str]] | None = None, **more: object) -> probe.Described:
    n = len(texts)
    return probe.Described(**{
        "ids": [str(i) for i in range(n)], "shows": shows or [[f"thing {i}"] for i in range(n)], "kinds": [""] * n,
        "texts": texts, "finished": [True] * n, **more,
    })  # type: ignore[arg-type]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Irrelevant images


def test_pass_rate_is_the_share_of_answers_with_the_phrase_overall_and_by_kind() -> None:
    texts = ["这是无关图片。", "无关图片", "一只猫", "无关 图片"]
    m = keyed(probe.irrelevant(texts, ["chat", "noise", "noise", "noise"], PHRASE))

    assert m["irrelevant.pass"].value == 0.5 and m["irrelevant.pass"].n == 4
    assert m["irrelevant.pass/chat"].value == 1 and m["irrelevant.pass/noise"].value == pytest.approx(1 / 3)
    low, high = m["irrelevant.pass"].ci95 or (0, 0)
    assert 0.1 < low < 0.5 < high < 0.9


@pytest.mark.parametrize(
    ("phrase", "text", "said"),
    [
        (probe.Phrase("Irrelevant Image"), "that is an irrelevant  image!", True),
        (probe.Phrase("ＩＲＲＥＬＥＶＡＮＴ"), "irrelevant", True),  # full width
        (probe.Phrase("нет связи"), "Нет связи с заданием", True),
        (probe.Phrase("غير ذي صلة"), "هذه صورة غير ذي صلة", True),
        (probe.Phrase("irrelevant"), "relevant", False),
        (probe.Phrase("x", r"^(unrelated|off-topic)\b"), "unrelated picture", True),
        (probe.Phrase("x", r"^(unrelated|off-topic)\b"), "not unrelated, x", False),
    ],
)
def test_a_phrase_is_found_in_any_language_and_a_pattern_in_its_place(
    phrase: probe.Phrase, text: str, said: bool
) -> None:
    assert phrase.said_in(text) is said


# ---------------------------------------------------------------------------------------------------------------
# Hallucination


@pytest.mark.parametrize(
    ("phrase", "text", "said"),
    [
        ("无关图片", "这不是无关图片。", False),
        ("无关图片", "这并非一张无关图片", False),
        ("无关图片", "不是产品，无关图片", True),
        ("无关图片", "不是无关图片……对不起，是无关图片。", True),
        ("無關圖片", "這不屬於無關圖片", False),
        ("irrelevant image", "This is not an irrelevant image.", False),
        ("irrelevant image", "It isn’t really an Irrelevant  Image", False),
        ("irrelevant image", "No, an irrelevant image.", True),
        ("irrelevant image", "Not a product: irrelevant image", True),
        ("irrelevantes Bild", "Das ist kein irrelevantes Bild", False),
        ("image sans rapport", "Ce n'est pas une image sans rapport", False),
        ("無関係な画像", "これは無関係な画像ではありません", False),
        ("無関係な画像", "これは無関係な画像です", True),
        ("관련 없는 이미지", "관련 없는 이미지가 아닙니다", False),
        ("not relevant", "This is not relevant.", True),
    ],
)
def test_a_phrase_that_is_taken_back_is_not_said(phrase: str, text: str, said: bool) -> None:
    assert probe.Phrase(phrase).said_in(text) is said
    assert probe.Phrase(phrase, negation=None).said_in(text)
    assert probe.Phrase("x", pattern="(?i)" + phrase.replace(" ", r"\s+")).said_in(text), "a pattern says that itself"


def test_what_is_asserted_and_not_shown_is_counted_and_what_is_shown_is_not() -> None:
    known = probe.trained(["A red square.", "blue", "Yes", "no"], ["A red square.", "Is it a disc?"], SHAPES)
    assert known.answers == {"a red square", "blue"} and known.objects == ("disc", "square")

    def why(text: str, *shows: str) -> str:
        return probe.invents(text, shows, known, SHAPES, PHRASE)

    assert why("There are two boxes on a table", "text") == "names square"
    assert why("There are two boxes on a table", "text", "box") == ""
    assert why("BLUE.", "text") == "is an answer of the training data"
    assert why("blue", "blue") == "" and why("A blue page of text", "text") == ""
    assert why("yes", "text") == "", "asserts nothing by itself"
    assert why("无关图片", "text") == "" and why("", "text") == ""


def test_labels_are_found_as_words_in_the_plural_and_in_scripts_without_spaces() -> None:
    assert probe.mentions("Two cats.", "cat") and not probe.mentions("a category", "cat")
    assert probe.mentions("一张聊天截图", "聊天") and not probe.mentions("一张图", "聊天")
    assert probe.mentions("a chat screenshot", "chat screenshot")


def test_hallucination_is_over_descriptions_and_polled_answers_with_an_interval_over_images() -> None:
    known = probe.trained(["a red square"], [], SHAPES)
    texts = ["a red square", "a page", "a disc", "a page"]
    d = described(texts, [["text"], ["text"], ["noise"], ["noise"]], kinds=["t", "t", "n", "n"],
                  polled=[True, False, None, True])  # fmt: skip
    rows, told = probe.hallucination(d, known, SHAPES, None)
    m = keyed(rows)

    assert m["ood.hallucination"].value == pytest.approx(4 / 7) and m["ood.hallucination"].n == 4
    assert m["ood.hallucination/t"].value == pytest.approx(2 / 4)
    assert m["ood.hallucination/n"].value == pytest.approx(2 / 3)
    assert m["ood.invents"].value == 0.5 and m["ood.says_yes"].value == pytest.approx(2 / 3)
    assert m["ood.hallucination"].ci95 is not None and m["ood.hallucination"].better == "lower"
    assert told == ["names square; says yes to what is absent", "", "names disc", "says yes to what is absent"]
    alone, _ = probe.hallucination(described(texts), known, SHAPES, None)
    assert "ood.says_yes" not in keyed(alone) and keyed(alone)["ood.hallucination"].value == 0.5


def test_what_is_said_of_images_of_unknown_content_is_no_hallucination() -> None:
    """A folder of photos: what they show may be what the model says."""
    known = probe.trained(["a red square"], [], SHAPES)
    d = described(["a red square", "a disc", "a page"], [[], ["text"], ["text"]], kinds=["photo", "page", "page"],
                  polled=[True, False, False])  # fmt: skip

    rows, told = probe.hallucination(d, known, SHAPES, None)

    m = keyed(rows)
    assert m["ood.hallucination"].value == 1 / 4 and m["ood.hallucination"].n == 2
    assert "1 images are left out, what they show is not known" in (m["ood.hallucination"].caveat or "")
    assert m["ood.invents"].value == 1 / 2 and m["ood.says_yes"].value == 0 and "ood.hallucination/photo" not in m
    assert told == ["", "names disc", ""]
    with pytest.raises(UserError, match="no record says what its image shows"):
        probe.hallucination(described(["a red square"], [[]]), known, SHAPES, None)


def test_what_is_polled_is_absent_and_named_by_the_training_where_it_names_anything() -> None:
    known = probe.trained([], ["a disc", "a disc and a square"], SHAPES)
    assert known.objects == ("disc", "square")
    for id in map(str, range(20)):
        assert probe.asked_about(id, ["a square"], known, SHAPES) == "disc"
        assert probe.asked_about(id, ["box", "disc"], known, SHAPES) is None
        assert probe.asked_about(id, ["text"], probe.Trained(), SHAPES) in SHAPES.names
        assert probe.asked_about(id, [], known, SHAPES) is None, "what it shows is not known, so nothing is absent"
    assert len({probe.asked_about(str(i), ["text"], known, SHAPES) for i in range(20)}) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes.", True), ("是的", True), (" YES it is", True), ("no, yes", False), ("yesterday", False),
        ("对，图片中有一只狗。", True), ("有一只狗。", True), ("是", True), ("对不起，图片中没有狗。", False),
        ("是否有狗？", False),
        ("是不是狗？", False), ("对于这个问题，没有。", False), ("有没有狗？", False),
    ],
)  # fmt: skip
def test_yes_is_what_an_answer_begins_with(text: str, said: bool) -> None:
    from beholder.config import OodConfig

    assert probe.says(OodConfig().yes, text) is said


# ---------------------------------------------------------------------------------------------------------------
# Blindness, sanity


def test_empty_near_empty_and_image_independent_descriptions_are_blind() -> None:
    rows, told = probe.blind(described(["", " .!", "a", "猫", "a cat", "一只猫"]), None)
    assert told == ["empty", "empty", "near-empty", "near-empty", "", ""]
    assert rows[0].value == pytest.approx(4 / 6) and rows[0].caveat == "2 empty, 2 near-empty"

    same, told = probe.blind(described(["A page."] * 5), None)
    assert same[0].value == 1 and set(told) == {"same as for another image"}
    excused, _ = probe.blind(described(["无关图片"] * 5), PHRASE)
    assert excused[0].value == 0, "right for all of them"
    alike, _ = probe.blind(described(["A page."] * 5, [["text"]] * 5), None)
    assert alike[0].value == 0 and "none was compared" in (alike[0].caveat or ""), "they show the same"


@pytest.mark.parametrize(
    ("text", "finished", "script", "why"),
    [
        ("A page of text.", True, None, ""),
        ("图片上有一段文字。", True, "cjk", ""),
        ("Это скриншот переписки.", True, "cyrillic", ""),
        ("هذه لقطة شاشة", True, "arabic", ""),
        ("A page of text.", True, "cjk", "not in cjk script"),
        ("12 34", True, "latin", "not in latin script"),
        ("图 text 片文字段落内容", True, "cjk", ""),
        ("이것은 대화 화면입니다.", True, "han", "not in han script"),
        ("… !", True, None, "empty"),
        ("a cat and a cat and a cat and a cat", True, None, "loops"),
        ("哈哈哈哈哈哈哈哈哈哈哈哈", True, None, "loops"),
        ("A page of", False, None, "does not end"),
    ],
)
def test_one_description_is_sane_in_any_language(text: str, finished: bool, script: str | None, why: str) -> None:
    assert probe.insane(text, finished, script) == why


def test_one_text_for_most_images_is_not_sane_unless_it_is_right_for_all() -> None:
    rows, told = probe.sanity(described(["a page", "A page.", "a page", "a cat"]), None, None)
    assert rows[0].value == 0.25 and told[3] == "" and told[0] == "the same for most images"
    assert probe.sanity(described(["a page", "a page", "a dog", "a cat"]), None, None)[0][0].value == 1
    assert probe.sanity(described(["无关图片"] * 4), None, PHRASE)[0][0].value == 1
    assert probe.sanity(described(["a page"] * 3), None, None)[0][0].value == 1, "too few to compare"
    assert probe.sanity(described(["a page"] * 4, [["text"]] * 4), None, None)[0][0].value == 1, "they show the same"


# ---------------------------------------------------------------------------------------------------------------
# Crops, gap


def test_answers_are_near_identical_up_to_one_word_in_five() -> None:
    assert probe.near_identical("A red bird sits here", "a red bird sits there.")
    assert not probe.near_identical("a red bird sits", "a blue bird sits")
    assert not probe.near_identical("red", "blue") and probe.near_identical("", "")
    assert probe.near_identical("图片上有一段文字", "图片上有一句文字") and not probe.near_identical("红色", "蓝色")


def test_consistency_is_the_share_of_pairs_that_stay() -> None:
    (m,) = probe.consistency(["red", "blue"], [["red", "blue"], ["red", "green"], ["red", "red"]])
    assert m.value == pytest.approx(4 / 6) and m.n == 2 and m.better == "higher"
    (whole,) = probe.consistency(["red"] * 4, [["Red."] * 4])
    assert whole.value == 1 and whole.ci95 == (1, 1)


def test_crops_keep_their_size_lie_inside_and_differ() -> None:
    for width, height in ((100, 50), (7, 1), (1, 1)):
        boxes = [probe.crop_box(width, height, keep) for keep in probe.CROPS]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert right - left == max(1, round(width * 0.94)) and bottom - top == max(1, round(height * 0.94))
    assert len({probe.crop_box(100, 50, keep) for keep in probe.CROPS}) == 3


def losses(*pairs: tuple[float, int]) -> list[SampleLoss]:
    return [SampleLoss(str(i), nll, n, 0, (nll / n,) * n, (n,)) for i, (nll, n) in enumerate(pairs)]


def test_gap_is_a_difference_of_token_weighted_losses_over_as_many_samples() -> None:
    m = keyed(probe.gap(losses((4, 2), (1, 1), (9, 1)), losses((1, 1), (1, 3))))
    assert m["gap.generalisation"].value == pytest.approx(5 / 3 - 2 / 4) and m["gap.generalisation"].n == 2
    assert m["gap.training_loss"].value == 0.5 and m["gap.generalisation"].better == "lower"

    rng = np.random.default_rng(0)
    held, train = ([(float(x), 4) for x in rng.normal(mean, 0.5, 200)] for mean in (8, 6))
    low, high = keyed(probe.gap(losses(*held), losses(*train)))["gap.generalisation"].ci95 or (0, 0)
    # The standard error is 0.5 · √2 / √200 / 4 = 0.0125 nats a token, the interval 4 of them wide.
    assert low < 0.5 < high and 0.035 < high - low < 0.065


def test_the_two_by_two_is_the_loss_with_adapters_over_that_without() -> None:
    off = {cell: losses((4, 2), (2, 1)) for cell in probe.CROSSED}
    on = off | {"own.trained": losses((1, 2), (2, 1)), "ood.plain": losses((8, 2), (4, 1)), "own.plain": []}
    m = keyed(probe.crossed(on, off))

    assert m["cross.own.trained"].value == 0.5 and m["cross.ood.trained"].value == 1 and m["cross.ood.plain"].value == 2
    assert "cross.own.plain" not in m and m["cross.ood.trained"].better == "none"


def test_coco_objects_serve_where_no_list_is_given() -> None:
    known = probe.trained(["a dog on a couch"], ["a dog on a couch"], load_objects())
    assert set(known.objects) == {"dog", "couch"}
