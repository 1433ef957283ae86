"""Which images the words of a sample name, and the same words about images that stand elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from beholder.data.places import absent, answer_place, named, references, renamed, stand_together
from beholder.types import Example, ImageRef, ImageSlot, Part, Turn


def example(question: str | tuple[Part, ...], answer: str, n: int = 3, answers: tuple[str, ...] = ()) -> Example:
    parts = (*(p for k in range(n) for p in (ImageSlot(k), "\n")), question) if isinstance(question, str) else question
    images = tuple(ImageRef("r", f"{k}.png") for k in range(n))
    return Example("id", images, (Turn("user", parts), Turn("assistant", (answer,))), answers=answers)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("what color is the shape in image 2?", [2]),
        ("Image #2 and Image #3", [2, 3]),
        ("compare images 1, 2 and 3", [1, 2, 3]),
        ("picture number 2 or photo two?", [2, 2]),
        ("is the second image like the 3rd picture?", [2, 3]),
        ("the first and third images", [1, 3]),
        ("what does the last image show?", [3]),
        ("the image 2", [2]),
        ("image 12", [12]),
        ("frame 1, the second panel and slide 3", [1, 2, 3]),
        ("in the picture 3 dogs play", []),
        ("how many images show a circle?", []),
        ("figure 2.5 and picture 3D", []),
        ("the first two images", []),
        ("two pictures of one dog", []),
        ("an imagery 2 of things", []),
        ("image 20%", []),
    ],
)
def test_places_that_a_text_names(text: str, places: list[int]) -> None:
    assert [r.place for r in references(text, 3)] == places


def test_left_and_right_are_places_of_two_images_only() -> None:
    assert [r.place for r in references("The left image has more dogs than the right image", 2)] == [1, 2]
    assert references("The left image", 3) == []
    assert renamed(example("Is the left image red?", "yes"), {1: 1, 2: 2, 3: 3}) is None


@pytest.mark.parametrize(
    ("question", "answer", "place"),
    [
        ("which image shows a red circle?", "2", 2),
        ("In which of the images is there a dog?", "Image 2.", 2),
        ("Which picture is it?", "the second one", 2),
        ("what image number has it?", "two", 2),
        ("how many images show a circle?", "2", None),
        ("how many dogs are in which image?", "2", None),
        ("what is in image 1?", "2", None),
        ("which image shows a red circle?", "the one with 2 dogs", None),
        ("which image shows a red circle?", "none", None),
    ],
)
def test_an_answer_that_is_a_place(question: str, answer: str, place: int | None) -> None:
    found = answer_place(question, answer, 3)

    assert (None if found is None else found.place) == place


@pytest.mark.parametrize(
    ("question", "answer", "asked", "said"),
    [
        ("what is in image 1?", "a dog", "what is in image 3?", "a dog"),
        ("which image shows a dog?", "1", "which image shows a dog?", "3"),
        ("Is the First image like image three?", "yes", "Is the Third image like image one?", "yes"),
        ("the 1st picture and the last picture", "yes", "the 3rd picture and the first picture", "yes"),
        ("how many images show one dog?", "1", "how many images show one dog?", "1"),
        ("besides image 2, which image shows a dog?", "Image 3.", "besides image 2, which image shows a dog?",
         "Image 1."),
    ],
)  # fmt: skip
def test_places_are_renamed_in_their_own_manner(question: str, answer: str, asked: str, said: str) -> None:
    other = renamed(example(question, answer), {1: 3, 2: 2, 3: 1})

    assert other is not None
    assert (other.turns[0].parts[-1], other.answer_text) == (asked, said)
    assert renamed(other, {1: 3, 2: 2, 3: 1}) is not None


@pytest.mark.parametrize(
    "question", ["the first two images", "what happens after image 1?", "image 4", "the middle picture", "in order"]
)
def test_what_cannot_be_renamed_with_certainty_is_not(question: str) -> None:
    assert renamed(example(question, "yes"), {1: 3, 2: 2, 3: 1}) is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which images show a dog?", "1 and 2"), ("Which images show a dog?", "1, 3"), ("Which one shows a dog?", "2"),
        ("Is the dog in image 1 or image 2?", "2"), ("How many dogs are in images 1 to 3?", "4"),
        ("How many dogs are in images 1-3?", "4"), ("what is in image A?", "a dog"), ("what is in image-1?", "a dog"),
        ("what is in Image_1?", "a dog"), ("Which picture shows a dog, A or B?", "B"),
        ("What picture is on the wall in image 1?", "2"), ("what is in Image II?", "a dog"),
        ("what is in picture i?", "a dog"), ("Was ist in Bild 2?", "ein Hund"), ("图2里有什么?", "a dog"),
        ("第二张图里有什么?", "a dog"), ("what is in #2?", "a dog"), ("what is in picture (2)?", "a dog"),
        ("what is in image 1 and in ②?", "a dog"), ("что на второй?", "a dog"), ("which image is it?", "Image II"),
        ("is the fırst one a dog?", "no"),
    ],
)  # fmt: skip
def test_what_may_name_places_in_a_way_that_is_not_read_is_not_moved(question: str, answer: str) -> None:
    assert renamed(example(question, answer), {1: 2, 2: 1, 3: 3}) is None


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What number is on the shirt in image 1?", "2"), ("What do I see in image 2?", "a dog"),
        ("In image 2 I see a dog, is it so?", "yes"), ("Is the X-ray in image 1 of a café?", "no"),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_place_is_not_in_the_way(question: str, answer: str) -> None:
    assert renamed(example(question, answer), {1: 2, 2: 1, 3: 3}) is not None


def test_the_label_of_an_image_stays_with_its_place_and_peoples_answers_follow() -> None:
    parts = ("Image 1: ", ImageSlot(0), "\n(Image 2: <Image>", ImageSlot(1), "</Image>) which image is red, image 2?")
    given = example(parts, "2", n=2, answers=("2", "Image 2", "two dogs"))

    other = renamed(given, {1: 2, 2: 1})

    assert other is not None
    assert other.turns[0].parts[0] == "Image 1: " and other.turns[0].parts[2] == "\n(Image 2: <Image>"
    assert other.turns[0].parts[4] == "</Image>) which image is red, image 1?"
    assert other.answer_text == "1" and other.answers == ("1", "Image 1", "two dogs")
    assert named(given).asked == (2,) and named(given).answered == (2,)


@pytest.mark.parametrize(
    ("question", "answer", "n", "places"),
    [
        ("what is in image 5?", "a dog", 3, [5]),
        ("which image shows it?", "7", 3, [7]),
        ("image 3 and the second image", "a dog", 3, []),
        ("what is in image 2?", "a dog", 1, [2]),
        ("what is in image 2?", "a dog", 0, []),
        ("image 0 and the fourth image", "the third one", 3, [0, 4]),
    ],
)
def test_a_reference_to_an_image_that_is_not_there_is_found(
    question: str, answer: str, n: int, places: list[int]
) -> None:
    assert absent(example(question, answer, n=n).turns, n) == places


@pytest.mark.parametrize(
    "text",
    ["image 1 and the fırst image", "image 1, the ſecond image", "image 1, image sıx", "image 1, the laſt image"],
)
def test_letters_that_only_look_alike_name_no_place(text: str) -> None:
    assert absent(example(text, "no", n=2).turns, 2) == []


BLANKS, MUCH = " " * 20_000, 100_000


def seconds(read: Callable[[Example], object], given: Example) -> float:
    """Of the process's own work."""
    start = time.process_time()
    read(given)
    return time.process_time() - start


@pytest.mark.parametrize(
    "text",
    [
        f"Image 1{BLANKS}x", f"image{BLANKS}x", f"image #{BLANKS}#x", f"the{BLANKS}image 1 shows", f"first{BLANKS}x",
        *(s * (MUCH // len(s)) for s in ("image 1 ", "the image 1 x ", "image 1,", "first,", "image", "1 and ")),
        "image " + "1," * (MUCH // 4) + "x",
    ],
    ids=lambda text: " ".join(text[:24].split()),
)  # fmt: skip
def test_long_texts_take_no_longer_than_their_length(text: str) -> None:
    asked = example((ImageSlot(0), text, ImageSlot(1), "which image is it?"), "no", n=2)
    answered = example((ImageSlot(0), ImageSlot(1), "which image is it?"), text, n=2, answers=(text,))

    for given in (asked, answered):
        for read in (lambda e: absent(e.turns, 2), lambda e: renamed(e, {1: 2, 2: 1}), stand_together):
            # up to hours where it grows faster than they do; on a machine that is busy a second may be too little once
            assert any(seconds(read, given) < 1 for _ in range(3))


@pytest.mark.parametrize(
    ("parts", "together"),
    [
        ((ImageSlot(0), "\n", ImageSlot(1), "\nwhich is red?"), True),
        (("Look. Image 1: ", ImageSlot(0), "\nImage 2: ", ImageSlot(1), "which is red?"), True),
        (("(Image 1: <Image>", ImageSlot(0), "</Image>, (Image 2: <Image>", ImageSlot(1), "</Image>) ?"), True),
        (("<Image>", ImageSlot(0), "</Image>\n<Image>", ImageSlot(1), "</Image>"), True),
        ((ImageSlot(0), " was taken in Paris. ", ImageSlot(1), " was taken in Rome. Where was image 2 taken?"), False),
        ((ImageSlot(0), "This is a cat.", ImageSlot(1), "This is a"), False),
        ((ImageSlot(0), "Paris. Image 2: ", ImageSlot(1), "where?"), False),
        ((ImageSlot(0), "Image 1: ", ImageSlot(1), "where?"), False),
    ],
)
def test_words_between_the_images_keep_them_where_they_are(parts: tuple[Part, ...], together: bool) -> None:
    given = example(parts, "no", n=2)

    assert stand_together(given) == together
    later = (Turn("user", (ImageSlot(0), "?")), Turn("assistant", ("no",)), Turn("user", (ImageSlot(1), "?")))
    assert not stand_together(Example("id", given.images, (*later, given.turns[1])))
