"""Ten thousand question-answer pairs scored by the official VQA evaluation, for a test to hold ours against.

    git clone https://github.com/GT-Vision-Lab/VQA /tmp/VQA
    python benchmarks/vqa_agreement.py --official /tmp/VQA --python python2.7

The official code runs as it is, on files in its own formats, under the Python 2.7 it is written for; nothing of it is
kept. Pairs are made from a seed to hit what it treats oddly: contractions, articles, number words, punctuation beside
spaces, between letters and inside numbers, case, line breaks, people who all agree, texts with very many periods, and
(one pair in twenty) fewer than ten people. ``tests/probes/data/vqa_official.jsonl.gz`` holds a line a pair:
[prediction, [answer, how many gave it, …], accuracy].
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
from collections import Counter
from pathlib import Path

from beholder.probes.vqa import normalize_answer, vqa_accuracy

OUT = Path(__file__).parents[1] / "tests" / "probes" / "data" / "vqa_official.jsonl.gz"

DRIVER = """
import json, sys
sys.path[:0] = [sys.argv[1] + "/PythonHelperTools/vqaTools", sys.argv[1] + "/PythonEvaluationTools"]
from vqa import VQA
from vqaEvaluation.vqaEval import VQAEval
known = VQA("annotations.json", "questions.json")
judge = VQAEval(known, known.loadRes("results.json", "questions.json"), n=12)
judge.evaluate()
json.dump(judge.evalQA, open("accuracies.json", "w"))
"""

NOUNS = (
    "dog", "cat", "train", "bus stop", "tennis racket", "red", "blue", "light-blue", "black and white", "black/white",
    "black & white", "t-shirt", "yes", "no", "on table", "behind the house", "man", "woman's hat", "mcdonald's",
    "café", "jalapeño", "naïve", "Zürich", "São Paulo", "东京", "Ω", "½", "“quoted”", "it’s", "u.s.a.", "u.s.a", "p.m.",
    "St. Mary", "no. 7", "wi-fi", "rock_n_roll", "c++", "c#", "a/c", "#1", "50%", "$5", "me@home.com", "http://a.b/c",
    "<unk>", "[sep]", "{x}", "(none)", "f = ma", "x>y", "back\\slash", "`tick`", "what?!", "wait...", "a", "an", "the",
    "a the an", "vitamin a", "theatre", "another", "i don't know", "can't tell", "unanswerable", "",
)  # fmt: skip
NUMBERS = (
    "none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "0", "1", "2", "3", "10", "12", "100", "1,000", "10,000,000", "1.000", "3.5", ".5", "5.", "1.", "12:30", "12.30",
    "10:10 a.m.", "1/2", "2-3", "7-11", "2,3", "2, 3", "1,2,3", "1st", "20's", "1980s", "one two", "two-three", "٣",
    "5.٣", "1,000.5 red-ish", "3.5.", "6 , 7", "1,a", "a,1", "747", "twenty one", "hundred", "-3", "+4", "=5", "2x4",
)  # fmt: skip
# Every spelling of the official table's families, and some that it does not know.
STEMS = (
    "ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "he", "how", "i", "is", "it", "let", "ma",
    "might", "must", "need", "not", "o", "ought", "ow", "sha", "she", "should", "somebody", "someone", "something",
    "that", "there", "they", "twas", "was", "we", "were", "what", "when", "where", "who", "why", "wo", "would", "y",
    "yall", "you", "t", "this", "cow", "could not",
)  # fmt: skip
TAILS = (
    "nt", "n't", "ve", "'ve", "d", "'d", "ll", "'ll", "s", "'s", "re", "'re", "m", "'m", "ntve", "n'tve", "nt've",
    "n't've", "dve", "d've", "'dve", "'d've", "am", "clock", "'clock", "'s'at", "s'at", "'sat", "all", "'all",
    "allll", "'allll", "all'd've", "'all'd've", "alld've", "'alld've", "'all'dve", "all'll", "'all'll", "was", "'was",
    "'am",
)  # fmt: skip
FAMILIES: dict[str, list[str]] = {}
"""Spellings that differ by apostrophes alone, two or more each."""
for stem in STEMS:
    for tail in TAILS:
        for spelling in (stem + tail, "'" + stem + tail, (stem + tail).replace("'", "")):
            family = FAMILIES.setdefault(spelling.replace("'", ""), [])
            family += [] if spelling in family else [spelling]
KNOWN = [bare for bare, spellings in FAMILIES.items() if any(normalize_answer(x) != x for x in spellings)]

MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
OTHER_MARKS = (".", ":", "'", "&", "#", "$", "%", "*", "~", "|", "^", "…", "–", "’")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SAME = {w: str(k) for k, w in enumerate(DIGITS)} | {str(k): w for k, w in enumerate(DIGITS)} | {"none": "0"}
CONTRACTED = ("nt", "ve", "d", "ll", "s", "re", "m", "am", "clock", "all")
SPACES = (" ", "  ", "\t", "\n", "\r\n", "\u00a0")


def main() -> None:
    """Make the pairs, have them scored, say whether ours agrees, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a clone of GT-Vision-Lab/VQA")
    parser.add_argument("--python", default="python2.7", help="a Python 2.7")
    parser.add_argument("--scratch", type=Path, default=Path("vqa_agreement"), help="folder for the official files")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    pairs = [make_pair(rng) for _ in range(args.pairs)]
    official = score_officially(pairs, args.official.resolve(), args.python, args.scratch)
    differ = [k for k, (said, given) in enumerate(pairs) if abs(vqa_accuracy(said, given) - official[k]) > 1e-12]
    kinds = Counter(f"{100 * score:.0f} %" for score in official)
    print(
        f"{len(pairs)} pairs, {len(differ)} differ; accuracies "
        + ", ".join(f"{k}: {n}" for k, n in kinds.most_common())
    )
    for k in differ[:20]:
        print(f"  {pairs[k]} official {official[k]} ours {vqa_accuracy(*pairs[k])}")
    rows = []
    for (said, given), score in zip(pairs, official, strict=True):
        counted = [x for answer, n in Counter(given).items() for x in (answer, n)]  # their order does not matter
        rows.append(json.dumps([said, counted, round(score, 12)], ensure_ascii=False, separators=(",", ":")) + "\n")
    # A fixed time in the header: the same seed writes the same bytes.
    OUT.write_bytes(gzip.compress("".join(rows).encode(), 9, mtime=0))
    print(f"{OUT.name}: {OUT.stat().st_size} bytes")


def make_pair(rng: random.Random) -> tuple[str, list[str]]:
    """A prediction and the answers of four to ten people: one to three meanings, each spelled in some ways."""
    n = 10 if rng.random() < 0.95 else rng.randint(4, 9)
    if rng.random() < 0.3:  # the same but for apostrophes: right only where the official table says so
        family = FAMILIES[rng.choice(KNOWN if rng.random() < 0.8 else list(FAMILIES))]
        some = [*rng.sample(family, min(2, len(family))), "no"]
        said = rng.choice(family)
        return said if rng.random() < 0.7 else spell(rng, said), rng.choices(some, k=n)
    meanings = [phrase(rng) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    agreed = rng.random() < 0.2
    spellings = [spell(rng, m) for m in meanings for _ in range(1 if agreed else rng.choice((1, 1, 2, 3)))]
    if agreed:
        given = [spellings[0]] * n
        if rng.random() < 0.3:  # the same letters after the line breaks are gone
            given[rng.randrange(n)] = f"\n{spellings[0]} "
    else:
        given = rng.choices(spellings, weights=[rng.random() ** 2 + 0.05 for _ in spellings], k=n)
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(given), given
    if kind < 0.9:
        return spell(rng, rng.choice(meanings)), given
    return spell(rng, phrase(rng)), given


def phrase(rng: random.Random) -> str:
    words = [word(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.01:
        words = ["a.b"] * rng.randint(20, 50)  # more periods than the official code takes out
    return " ".join(words)


def word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(NOUNS)
    if kind < 0.6:
        return rng.choice(NUMBERS)
    if kind < 0.85:
        return rng.choice(STEMS) + rng.choice(TAILS)
    return rng.choice(("1", "a", "x", "9", "it", "")) + rng.choice(MARKS + OTHER_MARKS) + rng.choice(("2", "b", ""))


def spell(rng: random.Random, text: str) -> str:
    """``text`` as somebody else might write it: up to three small changes, most of which the normaliser undoes."""
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        match rng.randrange(11):
            case 0:
                text = rng.choice(("a ", "an ", "the ", "The ", "A ")) + text
            case 1:
                text = rng.choice((text.upper(), text.capitalize(), text.title()))
            case 2:
                text = text + rng.choice((".", "!", "?", "..", " .", ",", ";", " !"))
            case 3:
                k = rng.randint(0, len(text))
                text = text[:k] + rng.choice(MARKS + OTHER_MARKS) + text[k:]
            case 4:
                k = rng.randint(0, len(text))
                text = text[:k] + rng.choice(SPACES) + text[k:]
            case 5:
                text = text.replace(rng.choice(("'", "-", " ", ".")), "", 1)
            case 6:
                text = rng.choice(('"{}"', "({})", " {} ", "{} the", "[{}]")).format(text)
            case 7:
                text = text.replace(" ", rng.choice(("-", "/", "  ", "\n")), 1)
            case 8:
                text = " ".join(SAME.get(w.lower(), w) for w in text.split(" "))
            case _:
                text = text.replace("'", "")
                for tail in rng.sample(CONTRACTED, 2):
                    text = re.sub(rf"(?<=[a-z]){tail}\b", f"'{tail}" if tail != "nt" else "n't", text, count=1)
    return text


def score_officially(pairs: list[tuple[str, list[str]]], clone: Path, python: str, scratch: Path) -> list[float]:
    """Accuracy of each pair by the official code, through the files it reads."""
    scratch.mkdir(parents=True, exist_ok=True)
    facts = {"info": {}, "license": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014"}
    annotations = [
        {
            "question_id": k, "image_id": k, "question_type": "what is", "answer_type": "other",
            "answers": [{"answer_id": i + 1, "answer": a, "answer_confidence": "yes"} for i, a in enumerate(given)],
        }
        for k, (_, given) in enumerate(pairs)
    ]  # fmt: skip
    questions = [{"question_id": k, "image_id": k, "question": "What is it?"} for k in range(len(pairs))]
    results = [{"question_id": k, "answer": said} for k, (said, _) in enumerate(pairs)]
    for name, content in (
        ("annotations", facts | {"annotations": annotations}), ("questions", facts | {"questions": questions}),
        ("results", results),
    ):  # fmt: skip
        (scratch / f"{name}.json").write_text(json.dumps(content))
    subprocess.run([python, "-c", DRIVER, str(clone)], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    by_id = json.loads((scratch / "accuracies.json").read_text())
    return [by_id[str(k)] / 100 for k in range(len(pairs))]


if __name__ == "__main__":
    main()
