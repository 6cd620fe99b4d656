"""Plans: a JSON record that says the same when read again, and refuses what it cannot mean."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.backbone import Backbone
from offramp.checks import FULL_HEAD, FullHead, GateFile, Head, LowRank, Refined, Shortlist, Tokens
from offramp.errors import OfframpError, UsageError
from offramp.paths import MLP
from offramp.plan import ModelId, Plan, read_plan, write_plan
from offramp.runs import Adapt, Exit, Full, Path, Route, Run, Skip, Speculate
from offramp.signals import registry

LAYERS = 6

LAW = settings(max_examples=40, deadline=None)

Keys = Sequence[str | int]

names = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
paths = st.lists(st.integers(0, 99), max_size=6).map(tuple)
lists = st.builds(
    Tokens, tokens=st.sets(st.integers(0, 2**31 - 1), min_size=2, max_size=9).map(sorted).map(tuple)
)
heads = st.just(FULL_HEAD) | st.builds(Shortlist, size=st.integers(2, 2**31 - 1)) | lists
runs: dict[str, st.SearchStrategy[Any]] = {
    "full": st.builds(Full),
    "exit": st.builds(
        Exit,
        signal=names | st.sampled_from(sorted(registry())),
        thresholds=st.dictionaries(st.integers(), numbers, max_size=4),
        kv=st.sampled_from(["exact", "copy"]),
        max_waiting=st.integers(1, 99),
        exit_prompt=st.booleans(),
        check=st.builds(FullHead)
        | st.builds(Shortlist, size=st.integers(2, 99))
        | lists
        | st.builds(LowRank, rank=st.integers(1, 99))
        | st.builds(GateFile, file=names),
        classifier=st.none() | names,
        head=heads,
    ),
    "speculate": st.builds(
        Speculate, draft=paths, tokens=st.integers(-9, 99), min_confidence=numbers, head=heads
    ),
    "adapt": st.builds(
        Adapt,
        drafts=st.lists(paths, max_size=3).map(tuple),
        tokens=st.integers(1, 64),
        min_confidence=numbers,
        head=heads,
    ),
    "path": st.builds(
        Path,
        layers=paths,
        head=heads,
    ),
    "skip": st.builds(Skip, gates=names),
}
runs["route"] = st.builds(
    Route,
    router=names,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    price=numbers,
    runs=st.lists(runs["full"] | runs["exit"] | runs["path"], max_size=3).map(tuple),
)
model_ids = st.builds(ModelId, name=names, num_layers=st.integers(), fingerprint=names)


def backbone(fingerprint: str = "this one") -> Backbone:
    """What a plan looks at of a backbone."""
    shape = SimpleNamespace(num_layers=LAYERS, vocab_size=9, hidden_size=8)
    return cast("Backbone", SimpleNamespace(shape=shape, fingerprint=fingerprint, blocks={}))


def example(kind: str) -> dict[str, Any]:
    """A plan of this kind with every key that it can have, as JSON."""
    run: dict[str, dict[str, Any]] = {
        "full": {},
        "exit": {
            "signal": "max_prob",
            "thresholds": {"2": 0.5, "4": 1},
            "kv": "copy",
            "max_waiting": 3,
            "exit_prompt": True,
            "check": {"kind": "shortlist", "size": 7},
            "classifier": None,
            "head": {"kind": "shortlist", "size": 7},
        },
        "skip": {"gates": "g.safetensors"},
        "speculate": {
            "draft": [0, 1, 3],
            "tokens": 2,
            "min_confidence": 0.25,
            "head": {"kind": "shortlist", "size": 9},
        },
        "adapt": {
            "drafts": [[0, 1, 3], [0]],
            "tokens": 3,
            "min_confidence": 0.25,
            "head": {"kind": "shortlist", "size": 9},
        },
        "path": {"layers": [0, 2, 5], "head": {"kind": "shortlist", "size": 9}},
        "route": {
            "router": "r.safetensors",
            "digest": "0f" * 32,
            "price": 0.5,
            "runs": [{"kind": "full"}],
        },
    }
    model = {"name": "tiny", "num_layers": LAYERS, "fingerprint": "this one"}
    return {"format": 1, "model": model, "run": {"kind": kind, **run[kind]}, "certificate": None}


def changed(kind: str, keys: Keys, value: object) -> str:
    """The JSON of a plan with another value under these keys."""
    plan: Any = example(kind)
    *parents, last = keys
    reduce(getitem, parents, plan)[last] = value
    return json.dumps(plan)


def named(kind: str, keys: Keys) -> str:
    """How a message names these keys."""
    first, *others = keys
    inner = [kind] if first == "run" and others else []
    if others[:1] in (["check"], ["head"]) and others[1:]:
        others.insert(1, "shortlist")  # as in the example
    return ".".join(map(str, [first, *inner, *others]))


# -- to a file and back


@pytest.mark.parametrize("kind", runs)
@LAW
@given(st.data(), st.none() | model_ids)
def test_a_plan_is_read_as_it_was_written(
    kind: str, data: st.DataObject, model: ModelId | None
) -> None:
    """Every kind of plan comes back equal."""
    plan = Plan(model=model, run=data.draw(runs[kind]))
    with TemporaryDirectory() as folder:
        path = FilePath(folder) / "plan.json"
        write_plan(path, plan)
        assert plan == read_plan(path)


@pytest.mark.parametrize("kind", runs)
def test_a_plan_file_holds_its_keys(tmp_path: FilePath, kind: str) -> None:
    """What is written is a JSON object of the documented keys, one line each, none left out."""
    expected = example(kind)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(expected))
    plan = read_plan(path)
    write_plan(path, plan)
    assert expected == json.loads(path.read_text("utf-8"))
    assert path.read_text("utf-8").startswith('{\n  "format": 1,\n  "model": {\n')
    assert path.read_text("utf-8").endswith("}\n")
    numbers = r"^\s+[\d.]+,?$"
    assert not re.findall(numbers, path.read_text("utf-8"), re.M), "a list of numbers is one line"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", Full()),
        ('{"run": {"kind": "full"}}', Full()),
        (
            '{"run": {"kind": "exit", "signal": "margin", "thresholds": {"3": 0}}}',
            Exit(signal="margin", thresholds={3: 0.0}),
        ),
        ('{"run": {"kind": "speculate", "draft": [0]}}', Speculate(draft=(0,))),
        ('{"run": {"kind": "adapt", "drafts": [[0]]}}', Adapt(drafts=((0,),))),
        ('{"run": {"kind": "path", "layers": [1]}}', Path(layers=(1,))),
    ],
)
def test_what_a_plan_leaves_out_has_its_default(
    tmp_path: FilePath, text: str, expected: Run
) -> None:
    """A plan written by hand needs no model and no optional key."""
    (tmp_path / "plan.json").write_text(text)
    assert Plan(format=1, model=None, run=expected) == read_plan(tmp_path / "plan.json")


def test_only_full_depth_and_speculation_are_lossless() -> None:
    """Exits and sub-models are lossy, whatever their thresholds and layers."""
    lossy: list[Run] = [
        Exit(signal="max_prob", thresholds={1: math.nextafter(1, 0)}),
        Path(layers=(0,)),
        Skip(gates="g"),
        Route(router="r", digest="0f" * 32, price=0.0, runs=(Full(),)),
    ]
    lossless: list[Run] = [Full(), Speculate(draft=(0,)), Adapt(drafts=((0,),))]
    expected = [True, True, True, False, False, False, False]
    assert expected == [Plan(run=run).lossless for run in [*lossless, *lossy]]
    known = ModelId(name="m", num_layers=2, fingerprint="f")
    heads: list[Head] = [FULL_HEAD, Refined(), Shortlist(size=9)]
    every = [Plan(run=Path(layers=(0, 1), head=head), model=known) for head in heads]
    assert [plan.lossless for plan in every] == [True, True, False]
    assert not Plan(run=Path(layers=(0, 1))).lossless
    assert not Plan(run=Path(layers=(0, 1 | MLP)), model=known).lossless


# -- refused when read


def refusal(path: FilePath, text: str | bytes) -> str:
    """What the user is told of a plan file with this content, without the file's name."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(OfframpError) as caught:
        read_plan(path)
    start = f"{path} is no plan: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


@pytest.mark.parametrize("kind", runs)
@pytest.mark.parametrize("keys", [["extra"], ["model", "extra"], ["run", "extra"]])
def test_an_unknown_key_is_named(tmp_path: FilePath, kind: str, keys: Keys) -> None:
    """A misspelt key is an error, not a default."""
    told = refusal(tmp_path / "plan.json", changed(kind, keys, 1))
    assert told.startswith(f"{named(kind, keys)}: ")


@pytest.mark.parametrize(
    ("kind", "keys", "values"),
    [
        ("full", ["format"], [0, 2, "1", None, [1], math.nan]),
        ("full", ["model"], ["tiny", 7, []]),
        ("full", ["model", "name"], [None, 7, True]),
        ("full", ["model", "num_layers"], ["6", 6.5, None, True, math.nan, math.inf]),
        ("full", ["model", "fingerprint"], [None, 7, ["this one"]]),
        ("full", ["run"], [None, "full", ["full"]]),
        ("exit", ["run", "signal"], [None, 7, ["max_prob"]]),
        ("exit", ["run", "thresholds"], [None, 0.5, [0.5], "2:0.5"]),
        ("exit", ["run", "thresholds", "2"], ["0.5", None, True, math.nan, math.inf, -math.inf]),
        ("exit", ["run", "thresholds", "deep"], [0.5]),
        ("exit", ["run", "thresholds", "2.5"], [0.5]),
        ("exit", ["run", "kv"], ["both", None, True]),
        ("exit", ["run", "max_waiting"], [0, -1, "3", 3.5, None, True, math.nan, math.inf]),
        ("exit", ["run", "exit_prompt"], ["true", 1, 0, None]),
        ("exit", ["run", "check"], [None, "full", [], {}, {"kind": "half"}, {"kind": "gate"}]),
        ("exit", ["run", "check"], [{"kind": "full", "size": 7}, {"kind": "low_rank", "rank": 0}]),
        ("exit", ["run", "check", "size"], [1, -3, 2**31, 7.0, "7", None, True, math.nan]),
        ("speculate", ["run", "draft"], [None, 2, "01", {"0": 1}]),
        ("speculate", ["run", "draft", 1], ["1", 1.5, None, True, math.nan]),
        ("speculate", ["run", "tokens"], ["2", 2.5, None, True, math.nan, math.inf]),
        ("speculate", ["run", "min_confidence"], ["0.5", None, True, math.nan, math.inf]),
        ("route", ["run", "router"], [None, 7]),
        ("route", ["run", "digest"], [None, "", "0f" * 31, "0F" * 32, "zz" * 32]),
        ("route", ["run", "price"], [None, "1", math.nan, math.inf]),
        ("route", ["run", "runs"], [None, {}, [7], [{"kind": "speculate", "draft": [0]}]]),
        ("adapt", ["run", "drafts"], [None, 2, "01", {"0": 1}]),
        ("adapt", ["run", "drafts", 0], [None, 2, "01", {"0": 1}]),
        ("adapt", ["run", "tokens"], ["2", 2.5, None, True, math.nan, math.inf, 0, 65]),
        ("skip", ["run", "gates"], [None, 7]),
        ("path", ["run", "layers"], [None, 2, "01"]),
        ("path", ["run", "layers", 0], ["0", 0.5, None, False, math.nan]),
        ("path", ["run", "head"], [None, "full", {}, {"kind": "low_rank", "rank": 2}]),
        ("path", ["run", "head", "size"], [1, -3, 2**31, 7.0, "7", None, True, math.nan]),
        (
            "path",
            ["run", "head"],
            [
                {"kind": "tokens", "tokens": tokens}
                for tokens in ([], [7], [2, 1], [1, 1], [-1, 2], [1, 2**31], [1, 2.0], "12", None)
            ],
        ),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: FilePath, kind: str, keys: Keys, values: list[object]
) -> None:
    """Every key takes one type, and no number that is none; the message leads to the key."""
    for value in values:
        told = refusal(tmp_path / "plan.json", changed(kind, keys, value))
        assert told.startswith(named(kind, keys)), (value, told)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"run": {}}', "run: "),
        ('{"run": {"kind": "deep"}}', "run: .*'deep'"),
        ('{"run": {"kind": "exit", "thresholds": {"1": 1}}}', "run.exit.signal: "),
        ('{"run": {"kind": "exit", "signal": "margin"}}', "run.exit.thresholds: "),
        ('{"run": {"kind": "speculate"}}', "run.speculate.draft: "),
        ('{"run": {"kind": "adapt"}}', "run.adapt.drafts: "),
        ('{"run": {"kind": "path"}}', "run.path.layers: "),
        ('{"model": {"name": "a", "num_layers": 6}}', "model.fingerprint: "),
    ],
)
def test_a_missing_key_is_named(tmp_path: FilePath, text: str, where: str) -> None:
    """A plan without what its kind needs is refused where it is missing."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(OfframpError, match=f"^{path} is no plan: {where}"):
        read_plan(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{'run': {}}",
        '{"run": {"kind": "full"},}',
        '{"format": 1} {}',
        "full",
        b'{"run": "\xff"}',
        b"\x89PNG\r\n",
        "[" * 10_000,
        '{"run": ' * 10_000,
        "[]",
        "null",
        "1",
        '"full"',
        '{"format": ' + "9" * 5_000 + "}",
    ],
    ids=lambda text: repr(text)[:20],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: FilePath, text: str | bytes) -> None:
    """Broken JSON, other JSON and other files end in one sentence about that file."""
    assert refusal(tmp_path / "plan.json", text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: FilePath) -> None:
    """A missing file and a folder are named, with the reason."""
    for path, reason in [(tmp_path / "plan.json", "No such file"), (tmp_path, "directory")]:
        with pytest.raises(OfframpError, match=f"{path}: .*{reason}"):
            read_plan(path)


# -- refused for a model


@pytest.mark.parametrize(
    "run",
    [
        Full(),
        *(Exit(signal="max_prob", thresholds={depth: 0.5}) for depth in range(1, LAYERS)),
        Exit(signal="max_prob", thresholds={5: 0.0, 1: 1.0, 3: 0.5}),
        Exit(signal="saturation", thresholds={1: -1.0, 2: 1.0}),
        Exit(signal="patience", thresholds={1: 3.0}),
        Exit(signal="entropy", thresholds={2: 0.5}, check=Shortlist(size=9)),
        Exit(signal="entropy", thresholds={2: 0.5}, check=LowRank(rank=8)),
        *(Speculate(draft=tuple(range(depth))) for depth in range(1, LAYERS)),
        Speculate(draft=(0, 2, 5), tokens=1, min_confidence=1.0),
        Speculate(draft=(0,), head=Shortlist(size=9)),
        Adapt(drafts=((0, 2, 5), (0, 1)), tokens=64),
        Path(layers=(0,)),
        Path(layers=(5,)),
        Path(layers=tuple(range(LAYERS))),
    ],
    ids=str,
)
def test_a_plan_that_fits_is_accepted(run: Run) -> None:
    """Every exit from 1 to L-1, any part of the layers to draft with, any layers as a path."""
    Plan(run=run).check(backbone())
    name = ModelId(name="tiny", num_layers=LAYERS, fingerprint="this one")
    Plan(run=run, model=name).check(backbone())


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        (Exit(signal="max_prob", thresholds={}), "at least one exit"),
        (Exit(signal="max_prob", thresholds={0: 0.5}), "1 to 5"),
        (Exit(signal="max_prob", thresholds={-1: 0.5}), "1 to 5"),
        (Exit(signal="max_prob", thresholds={3: 0.5, LAYERS: 0.5}), "1 to 5"),
        (Exit(signal="max_prob", thresholds={3: 0.5, 99: 0.5}), "1 to 5"),
        (Exit(signal="max_prob", thresholds={3: 1.5}), "threshold 1.5 at exit 3"),
        (Exit(signal="max_prob", thresholds={3: -0.1}), "threshold -0.1 at exit 3"),
        (Exit(signal="margin", thresholds={3: 0.5, 4: 2.0}), "threshold 2.0 at exit 4"),
        (Exit(signal="saturation", thresholds={3: -1.1}), "threshold -1.1 at exit 3"),
        (Exit(signal="patience", thresholds={3: -1.0}), "threshold -1.0 at exit 3"),
        (Exit(signal="guess", thresholds={3: 0.5}), "'guess'.*max_prob"),
        (Exit(signal="margin", thresholds={3: 0.5}, check=Shortlist(size=10)), "vocabulary of 9"),
        (Exit(signal="margin", thresholds={3: 0.5}, check=LowRank(rank=9)), "8 wide"),
        (Exit(signal="gate", thresholds={3: 0.5}), "'gate' does not go with the check full"),
        (Exit(signal="margin", thresholds={3: 0.5}, check=GateFile(file="g")), "no other signal"),
        (Path(layers=()), "one or more"),
        (Path(layers=(0, 6)), "0 to 5"),
        (Path(layers=(-1, 0)), "0 to 5"),
        (Path(layers=(2, 1)), "ascending"),
        (Path(layers=(1, 1)), "ascending"),
        (Speculate(draft=()), "ascending"),
        (Speculate(draft=(1, 2)), "from layer 0"),
        (Speculate(draft=(0, 2, 1)), "ascending"),
        (Speculate(draft=(0, 0)), "ascending"),
        (Speculate(draft=(0, 6)), "not all of the 6"),
        (Speculate(draft=tuple(range(LAYERS))), "not all of the 6"),
        (Speculate(draft=(0,), tokens=0), "1 token or more"),
        (Speculate(draft=(0,), head=Shortlist(size=10)), "vocabulary of 9"),
        (Adapt(drafts=()), "no draft"),
        (Adapt(drafts=((0,), (1, 2))), "from layer 0"),
        (Adapt(drafts=((0,), (0, 6))), "not all of the 6"),
        (Adapt(drafts=((0,),), min_confidence=1.1), "between 0 and 1"),
        (Adapt(drafts=((0,),), head=Shortlist(size=10)), "vocabulary of 9"),
        (Speculate(draft=(0,), min_confidence=1.1), "between 0 and 1"),
        (Speculate(draft=(0,), min_confidence=-0.1), "between 0 and 1"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(run: Run, complaint: str) -> None:
    """Exits, thresholds, signals, layers and drafts that a six-layer model lacks are named."""
    with pytest.raises(UsageError, match=complaint):
        Plan(run=run).check(backbone())


# Those left out need their file: see test_route and test_skipping.
@pytest.mark.parametrize("kind", sorted(runs.keys() - {"route", "skip"}))
def test_a_plan_for_another_model_is_refused(tmp_path: FilePath, kind: str) -> None:
    """A plan calibrated on one model is not run on another; both are named."""
    (tmp_path / "plan.json").write_text(json.dumps(example(kind)))
    plan = read_plan(tmp_path / "plan.json")
    plan.check(backbone("this one"))
    with pytest.raises(UsageError, match=r"made for tiny .*this one.*another one"):
        plan.check(backbone("another one"))


def test_a_records_value_cannot_be_changed() -> None:
    """What was checked is what is run."""
    for record, key in [(Plan(), "run"), (Path(layers=(0,)), "layers")]:
        with pytest.raises(ValueError, match="frozen"):
            setattr(record, key, None)


# -- written whole


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr
)
def test_a_plan_is_written_whole_or_not_at_all(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A failed write leaves the old plan and nothing beside it, and a full disk names the file."""
    path = tmp_path / "plan.json"
    write_plan(path, Plan(run=Path(layers=(0, 2))))
    old = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OfframpError, KeyboardInterrupt)) as caught:
        write_plan(path, Plan())
    if isinstance(error, OSError):
        assert f"cannot write {path}: {error.strerror}" == str(caught.value)
    assert [(path, old)] == [(entry, entry.read_bytes()) for entry in tmp_path.iterdir()]
