"""Writes a narrow task as rows of prompt and completion, split so that no test text is trained on.

    python experiments/narrow_data.py e2e --data data/e2e_nlg --out e2e

TASK is e2e (data to text), sst2 (sentiment of a sentence) or ag_news (topic of a news item). OUT
gets train.jsonl, dev.jsonl and test.jsonl, for the trainer with --raw: prompt and completion are
tokenised apart. Several rows with one prompt are references of one text.

* e2e. The training file is not in the data, so the challenge's development set is trained on, a
  tenth of it held out by meaning. It is the cleaned version, because 40% of its rows said more or
  less than the original meaning they stood beside, and what teaches to invent or forget cannot be
  told from a shallow model's mistakes. The test is the original one: 630 meanings of seven
  references each, where the cleaned one has two or three. No meaning is in both. The test's names,
  foods and places are mostly ones that the development set never shows, so copying is tested, not
  remembering. OUT/prompts.jsonl gets the training prompts and synthetic ones, for
  self-distillation: the attributes of a training meaning, in every second one with values seen in
  training, in the others with invented names and foods, none of them a value of the test.
* sst2. The three splits as they are, without training rows whose sentence is tested.
* ag_news. Only the 7,600 test rows are in the data: 5,600 / 500 / 1,500 of them by the seed.
  Figures compare arms with each other, not with the literature.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import html
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from offramp.evaluate.meanings import Meaning, as_prompt, parse_meaning, parse_prompt
from offramp.files import write_text

Pair = tuple[str, str]
"""A prompt and one of its completions."""
Splits = dict[str, list[Pair]]

SENTIMENT, TOPIC = "\nSentiment:", "\nTopic:"
SENTIMENTS = {"0": " negative", "1": " positive"}
TOPICS = {"1": " World", "2": " Sports", "3": " Business", "4": " Technology"}
LABELS = {"sst2": tuple(SENTIMENTS.values()), "ag_news": tuple(TOPICS.values())}
"""What a classifier may answer; each is one token of SmolLM2's vocabulary."""
AG_SIZES = (5600, 500)
"""Rows of ag_news trained on and held out; the rest is the test."""
AG_LENGTH = 320
"""Most characters of a news item: nine in ten are shorter."""

_FIRST = ("Silver", "Copper", "Quiet", "Hidden", "Amber", "Crimson", "Velvet", "Rusty", "Northern")
_SECOND = ("Fox", "Lantern", "Anchor", "Orchard", "Kettle", "Harbour", "Bridge", "Sparrow", "Oak")
_INVENTED = {
    "food": ["Thai", "Greek", "Mexican", "Spanish", "Turkish", "Korean", "Lebanese", "Moroccan"],
    "type": ["bar", "bistro", "tavern", "diner", "canteen"],
}


def main() -> None:
    """Write the splits of one task, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["e2e", *LABELS])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--synthetic", type=int, default=4000, help="e2e: synthetic prompts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(options.seed)
    splits = apart(_SPLITS[options.task](options.data, drawn))
    for name, pairs in splits.items():
        _write(options.out / f"{name}.jsonl", ({"prompt": p, "completion": c} for p, c in pairs))
    if options.task == "e2e":
        known, tested = (
            [parse_prompt(p) for p in dict.fromkeys(p for p, _ in splits[name])]
            for name in ("train", "test")
        )
        made = synthetic(known, tested, options.synthetic, drawn)
        _write(options.out / "prompts.jsonl", ({"prompt": as_prompt(m)} for m in (*known, *made)))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file that this program wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def apart(splits: Splits) -> Splits:
    """Return the splits without rows whose prompt is in a later one: train, dev, test."""
    kept: Splits = {}
    taken: set[str] = set()
    for name in reversed(splits):
        kept[name] = [pair for pair in splits[name] if pair[0] not in taken]
        taken |= {prompt for prompt, _ in splits[name]}
    return {name: kept[name] for name in splits}


def invented_names() -> list[str]:
    """Return names that are put together from two lists of words."""
    return [f"{start}{a} {b}" for start in ("", "The ") for a in _FIRST for b in _SECOND]


def synthetic(
    known: Sequence[Meaning], tested: Sequence[Meaning], count: int, drawn: random.Random
) -> list[Meaning]:
    """Return meanings with the attributes of known ones and other values; none is tested or known.

    Every second one takes the known values, the others invented names, foods and kinds of place.
    No invented value is a value of a tested meaning.
    """
    values = _values(known)
    spent = {value for found in _values(tested).values() for value in found}
    names = invented_names()
    invented = {**_INVENTED, "name": names, "near": names}
    fresh = {key: [v for v in made if v not in spent] for key, made in invented.items()}
    taken, made = {frozenset(m) for m in (*known, *tested)}, list[Meaning]()
    for turn in range(100 * count):  # more than enough, and an end where there are none left
        if len(made) == count:
            break
        source = {**values, **fresh} if turn % 2 else values
        meaning = tuple((key, drawn.choice(source[key])) for key, _ in drawn.choice(known))
        if frozenset(meaning) not in taken:
            taken.add(frozenset(meaning))
            made.append(meaning)
    return made


def _values(meanings: Iterable[Meaning]) -> dict[str, list[str]]:
    """Return each attribute's values, in the order they come."""
    found: dict[str, dict[str, None]] = {}
    for meaning in meanings:
        for key, value in meaning:
            found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}


def _e2e(data: Path, drawn: random.Random) -> Splits:
    rows = list(csv.DictReader(_lines(data / "cleaned_devel-fixed.no-ol.csv.gz")))
    # Cleaning made several meanings of one; they stay together, as their references are alike.
    originals = sorted({row["orig_mr"] for row in rows})
    held = set(drawn.sample(originals, len(originals) // 10))
    splits: Splits = {"train": [], "dev": []}
    for row in rows:
        # Cleaning left some meanings without a name, or with an attribute twice.
        keys = [key for key, _ in parse_meaning(row["mr"])]
        if "name" in keys and len(set(keys)) == len(keys):
            splits["dev" if row["orig_mr"] in held else "train"].append(_pair(row))
    tested = csv.DictReader(_lines(data / "testset_w_refs.csv.gz"))
    return {**splits, "test": [_pair(row) for row in tested]}


def _pair(row: dict[str, str]) -> Pair:
    return as_prompt(parse_meaning(row["mr"])), " " + " ".join(row["ref"].split())


def _sst2(data: Path, _drawn: random.Random) -> Splits:
    splits: Splits = {}
    for name, ending in (("train", ".gz"), ("dev", ""), ("test", ".gz")):
        lines = _lines(data / f"stsa.binary.{name}{ending}")
        rows = [line.rstrip("\n").split(" ", 1) for line in lines]
        splits[name] = [(text.strip() + SENTIMENT, SENTIMENTS[label]) for label, text in rows]
    return splits


def _ag_news(data: Path, drawn: random.Random) -> Splits:
    pairs = [
        (news(title, text) + TOPIC, TOPICS[label])
        for label, title, text in csv.reader(_lines(data / "test.csv.gz"))
    ]
    drawn.shuffle(pairs)
    first, second = AG_SIZES[0], sum(AG_SIZES)
    return {"train": pairs[:first], "dev": pairs[first:second], "test": pairs[second:]}


def news(title: str, text: str) -> str:
    """Return a news item as one line of readable text, cut after a word."""
    line = f"{title}. {text}".replace("\\", " ")
    line = re.sub(r"(?<!&)(#\d{2,4}|\b(?:quot|amp|lt|gt));", r"&\1;", line)  # some lost their sign
    line = html.unescape(line)
    line = " ".join(re.sub(r"<[^<>]*>", " ", line).split())
    return line if len(line) <= AG_LENGTH else line[:AG_LENGTH].rsplit(" ", 1)[0]


def _lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return list(io.StringIO(text, newline=""))


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
    print(f"{path.name}: {len(lines)} rows")


_SPLITS: dict[str, Callable[[Path, random.Random], Splits]] = {
    "e2e": _e2e,
    "sst2": _sst2,
    "ag_news": _ag_news,
}

if __name__ == "__main__":
    main()
