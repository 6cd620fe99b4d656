"""The tasks: what each file looks like, that no answer is shown, that the same is asked again."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from offramp.errors import OfframpError
from offramp.evaluate.items import Item, choice, few_shot
from offramp.evaluate.meanings import parse_prompt
from offramp.evaluate.prompts import held_out
from offramp.evaluate.tasks import TASKS, Task, find_tasks
from tests.stories import data_dir

MANY = range(12)


def lines(*rows: Any) -> str:
    """As JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def squad(i: int) -> dict[str, Any]:
    """An article of one paragraph."""
    answers = [{"text": f"a{i}", "answer_start": 0}, {"text": f"b{i}", "answer_start": 1}] * 2
    asked = {"question": f"q{i}", "id": str(i), "answers": answers}
    return {"title": "t", "paragraphs": [{"context": f"c{i}", "qas": [asked]}]}


def lettered(i: int, subject: str = "s") -> dict[str, Any]:
    """A row of MMLU."""
    return {"subject": subject, "question": f"q{i}", "choices": [*"wxyz"], "answer": "ABCD"[i % 4]}


FILES: dict[str, list[str]] = {
    "vicuna": [lines(*({"question_id": i, "turns": [f"q{i}", "more"]} for i in MANY))],
    "koala": [lines(*({"id": i, "prompt": f"q{i}"} for i in MANY))],
    "self_instruct": [
        lines(
            *(
                {"instruction": f"q{i}", "instances": [{"input": "x", "output": f"a{i}"}]}
                for i in MANY
            )
        )
    ],
    "wizardlm": [lines(*({"idx": i, "Instruction": f"q{i}"} for i in MANY))],
    "pandalm": [lines(*({"instruction": f"q{i}", "input": ""} for i in MANY))],
    "alpaca": [
        lines(*({"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(900)))
    ],
    "sst2": ["".join(f"{i % 2} q{i}\n" for i in MANY)],
    "ag_news": ["".join(f'"{1 + i % 4}","q{i}","more"\n' for i in MANY)],
    "commonsense_qa": [
        lines(
            *(
                {
                    "answerKey": "B",
                    "question": {"stem": f"q{i}", "choices": [{"text": "x"}, {"text": "y"}]},
                }
                for i in MANY
            )
        )
    ],
    "mmlu": [
        lines(*(lettered(i, "st"[i % 2]) for i in MANY)),
        lines(*(lettered(100 + i, "st"[i % 2]) for i in range(14))),
    ],
    "squad": [json.dumps({"data": [squad(i) for i in MANY]})],
    "triviaqa": [lines(*({"question": f"q{i}", "golden_answers": [f"a{i}", "b"]} for i in MANY))],
    "e2e": ["mr,ref\n" + "".join(f'"name[q{i // 3}], food[x]",ref {i}\n' for i in range(36))],
    "fv-antonym": [json.dumps([{"input": f"q{i}", "output": f"a{i}"} for i in MANY])],
    "wikitext2": ["".join(f"q{i} line\n" + "word " * 120 + "\n" for i in range(24))],
}


def written(task: Task, folder: Path, *, plain: bool) -> Path:
    """Write a task's files, packed as it names them or not."""
    for name, text in zip(task.files, FILES[task.name], strict=True):
        packed = name.endswith(".gz") and not plain
        place = folder / (name if packed else name.removesuffix(".gz"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_task_reads_its_data_sets_own_form(name: str, tmp_path: Path) -> None:
    """Packed or not, the same items by the same seed in another order by another one."""
    task = TASKS[name]
    packed, plain = (written(task, tmp_path / str(p), plain=p) for p in (False, True))
    items = task.items(packed, 0)
    assert items == task.items(plain, 0) == task.items(packed, 0)
    assert items != task.items(packed, 1)
    assert len({str(item.prompt) for item in items}) == len(items) >= 8
    for item in items:
        assert "q" in str(item.prompt)
        assert bool(item.references) == bool(task.scores)
        if task.kind == "choice":
            assert task.most == len(item.references) == 1
    if name in ("sst2", "ag_news", "commonsense_qa", "squad", "triviaqa", "fv-antonym"):
        asked = [str(item.prompt).rsplit("q", 1)[1] for item in items]
        shown = str(items[0].prompt).rsplit("\n\n", 1)[0]
        assert all(str(item.prompt).startswith(shown) for item in items)
        assert not any(f"q{number}" in shown.split() for number in asked)


def test_mmlu_shows_five_of_the_same_subject(tmp_path: Path) -> None:
    """From the development set, in its order, whatever is asked."""
    task = TASKS["mmlu"]
    for item in task.items(written(task, tmp_path, plain=False), 0):
        *shots, last = str(item.prompt).split("\n\n")
        start = int(last[len("Question: q") :].split("\n")[0]) % 2
        numbers = [int(shot[len("Question: q") :].split("\n")[0]) for shot in shots]
        assert numbers == [100 + start + 2 * i for i in range(5)]
        assert all(
            shot.endswith(f"Answer: {'ABCD'[n % 4]}")
            for shot, n in zip(shots, numbers, strict=True)
        )
        assert last.endswith("Answer:")


def test_e2e_has_every_reference_of_a_meaning(tmp_path: Path) -> None:
    """And its prompt says the meaning."""
    task = TASKS["e2e"]
    for item in task.items(written(task, tmp_path, plain=False), 0):
        number = int(dict(parse_prompt(str(item.prompt)))["name"][1:])
        assert item.references == tuple(f"ref {3 * number + i}" for i in range(3))


def test_what_alpaca_holds_out_depends_on_the_row_alone(tmp_path: Path) -> None:
    """About one in fifty, whatever stands beside it."""
    task = TASKS["alpaca"]
    found = {str(item.prompt) for item in task.items(written(task, tmp_path, plain=False), 0)}
    assert found == {f"q{i}" for i in range(900) if held_out(f"q{i}", "")}
    assert 8 <= len(found) <= 32


def test_passages_are_the_text(tmp_path: Path) -> None:
    """All of it, each line once, in pieces of whole lines."""
    task = TASKS["wikitext2"]
    items = task.items(written(task, tmp_path, plain=False), 0)
    pieces = sorted((str(item.prompt) for item in items), key=lambda t: int(t[1:].split(" ")[0]))
    assert "".join(pieces) == FILES["wikitext2"][0]


def test_demonstrations_are_drawn_and_not_asked() -> None:
    """The same ones before every question."""
    items = [Item(choice(f"q{i}", ("x", "y")), (" A",)) for i in MANY]
    asked = few_shot([*items, *items], 3, random.Random(0))
    assert len(asked) == len(MANY) - 3
    ends = {str(item.prompt).rsplit("\n\n", 1)[1] for item in asked}
    shown = str(asked[0].prompt).rsplit("\n\n", 1)[0].split("\n\n")
    assert {*shown, *(f"{end} A" for end in ends)} == {f"{item.prompt} A" for item in items}


def test_every_data_set_that_is_shared_can_be_read() -> None:
    """All tasks on the real files, with what their papers say they hold."""
    folder = data_dir()
    if folder is None:
        pytest.skip("the shared data is not here")
    sizes = {name: len(find_tasks([name])[0].items(folder, 0)) for name in TASKS}
    assert {
        "vicuna": 80, "koala": 180, "self_instruct": 252, "wizardlm": 218, "pandalm": 170,
        "mmlu": 14079, "e2e": 630, "squad": 1187,
    }.items() <= sizes.items()  # fmt: skip
    assert min(sizes.values()) > 50


def test_a_missing_file_is_named_with_its_home(tmp_path: Path) -> None:
    """Every task knows where its data is from."""
    for task in TASKS.values():
        with pytest.raises(OfframpError, match="get it from") as refused:
            task.items(tmp_path, 0)
        assert str(tmp_path / task.files[0]) in str(refused.value)
        assert "." in task.home
