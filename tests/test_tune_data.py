"""Training data: each format to the same rows, bad ones named, prompts as generated from."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import offramp
from offramp.errors import OfframpError, UsageError
from offramp.text import Prompt, encode, read_prompts
from offramp.tune import sources
from offramp.tune.data import TOO_LONG, Data, read_examples
from offramp.tune.rows import prompts_of, read_rows
from tests.conftest import byte_tokenizer
from tests.stories import data_dir

LAW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "Be kind."}
FORMS: list[tuple[dict[str, Any], Prompt, str]] = [
    ({"instruction": "Add", "input": "1, 2", "output": "3"}, "Add\n\n1, 2", "3"),
    ({"instruction": "Sing", "input": "", "output": "La"}, "Sing", "La"),
    ({"instruction": "Sing", "input": "<noinput>", "output": "La"}, "Sing", "La"),
    ({"instruction": "Sing", "input": None, "output": "La"}, "Sing", "La"),
    ({"instruction": "Sing", "output": "La", "text": "Sing: La"}, "Sing", "La"),
    ({"instruction": "Add", "context": "1, 2", "response": "3"}, "Add\n\n1, 2", "3"),
    ({"instruction": "Add", "instances": [{"input": "1", "output": "2"}]}, "Add\n\n1", "2"),
    ({"prompt": "Hi", "completion": " Ho"}, "Hi", " Ho"),
    ({"prompt": "Hi", "response": "Ho"}, "Hi", "Ho"),
    ({"prompt": [USER], "completion": [BOT]}, [USER], "Ho"),
    ({"question": "1 + 1?", "answer": "2"}, "1 + 1?", "2"),
    ({"messages": [USER, BOT]}, [USER], "Ho"),
    ({"messages": [SYSTEM, USER, BOT, USER, BOT]}, [SYSTEM, USER, BOT, USER], "Ho"),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        [USER],
        "Ho",
    ),
    ({"text": "A document."}, "", "A document."),
]
Write = Callable[[Path, Sequence[Any]], Path]


def _lines(folder: Path, rows: Sequence[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))
    return path


def _list(folder: Path, rows: Sequence[Any]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8-sig")
    return path


def _packed(write: Write) -> Write:
    def written(folder: Path, rows: Sequence[Any]) -> Path:
        plain = write(folder, rows)
        path = plain.with_name(plain.name + ".gz")
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        return path

    return written


WAYS = {
    "lines": _lines,
    "list": _list,
    "packed lines": _packed(_lines),
    "packed list": _packed(_list),
    "lines in a .json": lambda folder, rows: _lines(folder, rows).rename(folder / "rows.json"),
}


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_every_format_is_prompt_and_answer(tmp_path: Path, write: Write) -> None:
    """However the file is made."""
    found = read_rows([str(write(tmp_path, [row for row, _, _ in FORMS]))])
    assert [(prompt, answer) for _, prompt, answer in FORMS] == [
        (row.prompt, row.answer) for row in found.rows
    ]


def test_a_task_has_a_row_for_each_of_its_instances(tmp_path: Path) -> None:
    task = {"instruction": "Add", "instances": [{"input": str(i), "output": "x"} for i in range(3)]}
    found = read_rows([str(_lines(tmp_path, [task, task]))], limit=4)
    assert [f"Add\n\n{i}" for i in (0, 1, 2, 0)] == prompts_of(found.rows)


def test_documents_stand_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOne\r\ntwo.\n \n\n\nThree é.\n".encode())
    found = read_rows([str(path)])
    assert [(row.prompt, row.answer) for row in found.rows] == [("", "One\ntwo."), ("", "Three é.")]
    assert [f"{path}, line 1", f"{path}, line 6"] == [row.where for row in found.rows]
    assert prompts_of(found.rows) == []


def test_prompts_are_those_that_generate_reads(tmp_path: Path) -> None:
    """Whether or not they are answered."""
    asked = [{"prompt": "Hi"}, {"instruction": "Add", "input": "1"}, {"messages": [SYSTEM, USER]}]
    asked.append({"instruction": "Add", "input": "<noinput>"})
    path = _lines(tmp_path, asked)
    assert read_prompts(path) == prompts_of(read_rows([str(path)], answers=False).rows)
    with pytest.raises(OfframpError, match="line 1: no answer"):
        read_rows([str(path)])
    answered = _lines(tmp_path, [{"prompt": "Hi", "completion": ""}, {"messages": [USER, BOT]}])
    assert prompts_of(read_rows([str(answered)], answers=False).rows) == ["Hi", [USER]]


BAD = [
    ('{"instruction": "Sing", "output": ""}', "empty answer"),
    ('{"instruction": "Sing", "output": " \\n"}', "empty answer"),
    ('{"instruction": "Sing", "input": "x"}', "no answer"),
    ('{"instruction": "Sing", "output": null}', "no answer"),
    ('{"instruction": "", "output": "x"}', 'empty "instruction"'),
    ('{"prompt": "Hi", "completion": 3}', '"completion" is not a text'),
    ('{"prompt": 3, "completion": "x"}', '"prompt" is not a text'),
    ('{"instruction": "Sing", "input": ["x"], "output": "y"}', '"input" is not a text'),
    ('{"question": {"stem": "?"}, "answerKey": "A"}', '"question" is not a text'),
    ('{"instruction": "Add", "instances": []}', 'empty "instances"'),
    ('{"instruction": "Add", "instances": [1]}', "is not a JSON object"),
    ('{"other": "x"}', 'has no "messages"'),
    ('{"text": ""}', "empty answer"),
    ('{"messages": []}', "no message before the answer"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message before the answer"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no answer"),
    ('{"messages": [{"role": "user", "content": ["x"]}]}', 'a message without "role"'),
    ('{"messages": [{"role": "robot", "content": "x"}]}', 'a message without "role"'),
    ('{"messages": "x"}', "messages are no list"),
    ('{"messages": ["x"]}', "is not a JSON object"),
    ('{"prompt": "\\ud800", "completion": "x"}', "half of a surrogate pair"),
    ('{"prompt": "x", "completion": "\\udc00"}', "half of a surrogate pair"),
    (json.dumps({"messages": [{**USER, "content": "\ud800"}, BOT]}), "half of a surrogate pair"),
    ('["x"]', "not a JSON object"),
    ('"x"', "not a JSON object"),
    ('{"prompt": "x"', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"prompt": %s}' % ("1" * 5000), "not valid JSON"),
    (b'{"prompt": "\xff", "completion": "x"}', "not valid UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "Hi", "completion": "Ho"}'
    bad = line.encode() if isinstance(line, str) else line
    path.write_bytes(b"\n".join([good, b"", bad, good]))
    with pytest.raises(OfframpError) as error:
        read_rows([str(path)])
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert reason in str(error.value)
    assert str(error.value).endswith("; --skip-bad leaves such rows out")
    found = read_rows([str(path)], skip_bad=True)
    assert [int(row.where.split()[-1]) for row in found.rows] == [1, 4]
    [(counted, count)] = found.faults.counts.items()
    assert reason in counted
    assert count == 1


def test_a_bad_row_of_a_list_is_named_by_its_number(tmp_path: Path) -> None:
    path = _list(tmp_path, [{"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi"}])
    with pytest.raises(OfframpError, match=r"rows\.json, row 2: no answer"):
        read_rows([str(path)])


def test_a_bad_document_is_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"One.\n\ntwo\n\xff\n\nThree.")
    with pytest.raises(OfframpError, match=r"line 3: not valid UTF-8"):
        read_rows([str(path)])
    found = read_rows([str(path)], skip_bad=True)
    assert [row.answer for row in found.rows] == ["One.", "Three."]
    assert found.faults.counts == {"not valid UTF-8": 1}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b"", "no usable rows"),
        ("a.json", b"[]", "no usable rows"),
        ("a.txt", b" \n\n", "no usable rows"),
        ("a.jsonl", b'{"prompt": 1}\n{}\n', r"no usable rows \(2 bad ones skipped\)"),
        ("a.json", b'[{"prompt": "Hi",\n"completion": }]', "line 2: not valid JSON"),
        ("a.json", b'[{"prompt":\n"\xff"}]', "line 2: not valid UTF-8"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b"[%s]" % (b"1" * 5000), "not valid JSON"),
        ("a.jsonl.gz", b'{"prompt": "Hi", "completion": "Ho"}', "cannot read"),
        ("a.txt.gz", gzip.compress(bytes(9999), mtime=0)[:-9], "cannot read"),
        ("a.txt.gz", gzip.compress(b"abc", mtime=0)[:10] + b"\xff" * 30, "cannot read"),
        ("a.csv", b"a,b\n", r"\.json, \.jsonl, \.txt are read"),
        ("a.gz", gzip.compress(b"abc", mtime=0), r"are read, each also with \.gz"),
    ],
)
def test_a_file_without_rows_is_refused(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    """Bad rows may be skipped, a bad file may not."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OfframpError, match=complaint) as error:
        read_rows([str(path)], skip_bad=True)
    assert str(path) in str(error.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name, complaint in (
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "none"), "there is no file"),
        ("none.jsonl.gz", "there is no file"),
        ("/dev/null", "neither a file"),
    ):
        with pytest.raises(OfframpError, match=complaint):
            read_rows([name])
    with pytest.raises(UsageError, match="--data"):
        read_rows([])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_sizes_have_bounds(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line, a document, and a list that is parsed as a whole, also where they unpack to it."""
    monkeypatch.setattr(sources, "MAX_LINE", 50)
    monkeypatch.setattr(sources, "MAX_LIST", 50)
    row = b'{"prompt": "Hi", "completion": "Ho"}'
    fitting = {"a.jsonl": row, "a.txt": b"x" * 50, "a.json": b"[%s]" % row}[name]
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(fitting, mtime=0))
    assert len(read_rows([str(path)]).rows) == 1
    larger = {"a.jsonl": row[:-1] + b" " * 20 + b"}", "a.txt": b"x\n" * 51}
    path.write_bytes(gzip.compress(larger.get(name, fitting + b" " * 20), mtime=0))
    with pytest.raises(OfframpError, match=r"more than 50|too large for one JSON list"):
        read_rows([str(path)], skip_bad=True)


def test_files_are_known_by_their_bytes(tmp_path: Path) -> None:
    """By name without folders, all of them even under a limit; twice is twice."""
    (tmp_path / "sub").mkdir()
    row = {"prompt": "Hi", "completion": "Ho"}
    one, two = _lines(tmp_path, [row] * 3), _packed(_lines)(tmp_path / "sub", [row])
    other = tmp_path / "sub" / "rows.jsonl"
    found = read_rows([str(one), str(two), str(other)], limit=2)
    assert len(found.rows) == 2
    names = ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl (2)"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two, other)]
    assert found.files == dict(zip(names, digests, strict=True))


@given(st.integers(1, 12))
@LAW
def test_a_limit_takes_the_first_rows(tmp_path: Path, limit: int) -> None:
    path = _lines(tmp_path, [{"prompt": str(i), "completion": "x"} for i in range(5)])
    found = read_rows([str(path), str(path)], limit=limit)
    assert [str(i % 5) for i in range(10)][:limit] == prompts_of(found.rows)


def test_a_hub_id_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by its rows: another row is another fingerprint."""
    rows = [{"prompt": "Hi", "completion": "Ho"}, {"prompt": "Ha", "completion": "He"}]
    prints = []
    for there in (rows, rows[:1], rows):
        asked: dict[str, Any] = {}

        def load(name: str, split: str, there: Any = there, asked: Any = asked) -> Any:
            asked.update(name=name, split=split)
            return datasets.Dataset.from_list(there)

        monkeypatch.setattr(datasets, "load_dataset", load)
        found = read_rows(["org/set"])
        assert asked == {"name": "org/set", "split": "train"}
        assert [row["prompt"] for row in there] == prompts_of(found.rows)
        prints.append(found.files["org/set"])
    assert prints[0] == prints[2] != prints[1]


def test_a_hub_id_that_nobody_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OfframpError, match=r"^'org/none' is no file here, nor a data set"):
        read_rows(["org/none"])  # the tests are offline
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OfframpError, match=r"pip install 'offramp\[tune\]'"):
        read_rows(["org/none"])


def _merging(template: str | None, end: str | None = "<end>") -> PreTrainedTokenizerFast:
    """Bytes, where ``>a`` and ``>>`` are one token, with a special token for the end of a turn."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab | {">a": 256, ">>": 257}, [(">", "a"), (">", ">")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    return tokenizer


_START = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
_TRIM = _START.replace("'content']", "'content'] | trim")
_GO = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
_THOUGHT = "{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "no template": (_merging(None), "<end>"),
    "no end": (_merging(_START + _GO), "<end>"),
    "ends": (_merging(_START + "<turn>\n" + _GO), "<turn>"),
    "ends the text": (_merging(_START + "<turn>\n<end>\n" + _GO), "<turn>\n<end>"),
    "strips": (_merging(_TRIM + "<turn>\n" + _GO), "<turn>"),
    "opens a thought": (_merging(_START + "<turn>\n" + _THOUGHT), "<turn>"),
    "knows no end": (_merging(_START + _GO, end=None), ""),
}  # fmt: skip
texts = st.text(st.sampled_from("a> é\n😀"), min_size=1, max_size=9).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("raw", [False, True])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
@LAW
def test_what_is_learnt_is_what_is_generated_from(
    tmp_path: Path, kind: str, raw: bool, pairs: list[tuple[str, str]]
) -> None:
    """A prompt's tokens are ``encode``'s, whatever begins the answer, which is all there."""
    tokenizer, end = TOKENIZERS[kind]
    end = end if not raw and tokenizer.chat_template else tokenizer.eos_token or ""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    made = read_examples([str(_lines(tmp_path, rows))], tokenizer, raw=raw)
    assert len(made.examples) == len(pairs)
    for example, (prompt, answer) in zip(made.examples, pairs, strict=True):
        assert encode(tokenizer, prompt, raw=raw) == example.ids[: example.first]
        learnt = tokenizer.decode(example.ids[example.first :])
        assert learnt.endswith(end)
        assert answer.strip() == learnt.removesuffix(end).strip()
        assert not raw or answer + end == learnt


def test_a_chat_learns_its_last_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    chat = [SYSTEM, USER, BOT, USER, {"role": "assistant", "content": "Bye"}]
    [example] = read_examples([str(_lines(tmp_path, [{"messages": chat}]))], tokenizer).examples
    assert encode(tokenizer, chat[:-1]) == example.ids[: example.first]
    assert [*b"Bye"] == [*tokenizer.decode(example.ids[example.first : -1]).encode()]
    assert example.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("template", "raw"), [(False, False), (True, True)])
def test_a_chat_needs_a_template(tmp_path: Path, template: bool, raw: bool) -> None:
    path = _lines(tmp_path, [{"messages": [USER, BOT]}])
    with pytest.raises(UsageError, match="line 1: these are chat messages"):
        read_examples([str(path)], byte_tokenizer(template=template), raw=raw, skip_bad=True)


@given(st.integers(2, 40), st.lists(texts, min_size=1, max_size=5))
@LAW
def test_documents_are_cut_so_that_every_token_is_learnt_once(
    tmp_path: Path, length: int, documents: list[str]
) -> None:
    """But the first, which nothing comes before."""
    tokenizer = byte_tokenizer()
    path = _lines(tmp_path, [{"text": text * 9} for text in documents])
    made = read_examples([str(path)], tokenizer, max_length=length)
    assert all(1 < len(example.ids) <= length for example in made.examples)
    whole = [[*tokenizer(text * 9)["input_ids"], tokenizer.eos_token_id] for text in documents]
    learnt = [token for example in made.examples for token in example.ids[example.first :]]
    assert [token for ids in whole for token in ids[1:]] == learnt
    starts = [example.ids[0] for example in made.examples]
    assert whole[0][0] == starts[0]
    assert not made.truncated
    assert made.answer_tokens == made.tokens - len(made.examples) == len(learnt)


@given(st.integers(2, 60))
@LAW
def test_a_long_answer_is_cut_and_a_long_prompt_skipped(tmp_path: Path, length: int) -> None:
    tokenizer = byte_tokenizer(template=False)
    pairs = [("p" * asked, "a" * answered) for asked in (1, 19, 30) for answered in (1, 20)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    path = _lines(tmp_path, rows)
    fitting = [(len(p), len(p) + len(a) + 1) for p, a in pairs if len(p) < length]
    made = read_examples([str(path)], tokenizer, max_length=length)
    sizes = [(example.first, len(example.ids)) for example in made.examples]
    assert [(first, min(size, length)) for first, size in fitting] == sizes
    assert sum(size > length for _, size in fitting) == made.truncated
    assert len(pairs) - len(fitting) == made.skipped.get(TOO_LONG, 0)


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    path = str(_lines(tmp_path, [{"prompt": "p" * 9, "completion": "a"}]))
    with pytest.raises(OfframpError, match=f"nothing is left to train on.*{TOO_LONG}"):
        read_examples([path], byte_tokenizer(), max_length=9)
    with pytest.raises(UsageError, match="at least 2"):
        read_examples([path], byte_tokenizer(), max_length=1)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if s %}{{ raise_exception('no system') }}{% else %}...{% endif %}", "refuses it"),
        ("{% if s %}x{% else %}...{% endif %}", "drops its answer"),
        ("{% if s %}x{% if not add_generation_prompt %}<end>{% endif %}{% else %}...{% endif %}",
         "drops its answer"),
    ],
)  # fmt: skip
def test_a_row_that_the_template_refuses_is_named_or_counted(
    tmp_path: Path, template: str, reason: str
) -> None:
    """And its neighbours keep their own tokens."""
    tokenizer = byte_tokenizer()
    template = "{% set s = messages[0]['role'] == 'system' %}" + template
    tokenizer.chat_template = template.replace("...", tokenizer.chat_template)
    chats = [[USER, BOT], [SYSTEM, USER, BOT], [USER, {**BOT, "content": "Other"}]]
    path = str(_lines(tmp_path, [{"messages": chat} for chat in chats]))
    with pytest.raises(OfframpError, match=f"line 2: the model's chat template {reason}"):
        read_examples([path], tokenizer)
    made = read_examples([path], tokenizer, skip_bad=True)
    assert sum(made.skipped.values()) == 1
    answers = [tokenizer.decode(example.ids[example.first :]) for example in made.examples]
    assert answers == ["Ho<end>", "Other<end>"]


def _shared(name: str) -> str:
    folder = data_dir()
    path = folder and folder / name
    if path is None or not path.is_file():
        pytest.skip(f"{name} is not in the shared data")
    return str(path)


@pytest.mark.parametrize(
    ("name", "rows", "skipped"),
    [
        ("alpaca_libre/alpaca_libre_v1-3_ok.jsonl.gz", 3097, 0),
        ("alpagasus_subsets/dolly_3k.json.gz", 2996, 0),
        ("llms_from_scratch_instruct/instruction-data.json", 1100, 0),
        ("llms_from_scratch_instruct/instruction-data-with-preference.json", 1100, 0),
        ("self_instruct_seed/seed_tasks.jsonl", 175, 0),
        ("gsm8k/gsm8k_train.jsonl.gz", 7473, 0),
        ("alpaca_52k/alpaca_data_52k.jsonl.gz", 51974, 28),
    ],
)
def test_real_files_are_read_whole(name: str, rows: int, skipped: int) -> None:
    """All of what their sources say they hold; Alpaca has 28 empty answers."""
    found = read_rows([_shared(name)], skip_bad=True)
    assert len(found.rows) == rows
    assert sum(found.faults.counts.values()) == skipped


@pytest.mark.real
def test_the_default_model_learns_what_it_generates_from(
    smol: offramp.Model, tmp_path: Path
) -> None:
    """Behind its own template, to the end of its turn and not beyond."""
    rows = [row for row, prompt, _ in FORMS if prompt]
    made: Data = read_examples([str(_lines(tmp_path, rows))], smol.tokenizer)
    for example, (_, prompt, answer) in zip(made.examples, FORMS, strict=False):
        assert encode(smol.tokenizer, prompt) == example.ids[: example.first]
        learnt = smol.tokenizer.decode(example.ids[example.first :])
        assert answer + "<|im_end|>" == learnt
