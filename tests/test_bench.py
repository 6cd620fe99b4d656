"""The bench: turns in order, honest arithmetic, nobody silently absent, nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import offramp
from offramp.bench import own, peers
from offramp.bench.figures import Row, mismatches, rows, spread
from offramp.bench.race import Case, Ceiling, Contestant, Race, Sample, absent, race, together
from offramp.bench.worker import ENGINES, Watch, run
from offramp.certificate import Certificate, HeldOut
from offramp.cost import weight_bytes
from offramp.fast.build import UnavailableError
from offramp.meter import Meter
from offramp.plan import ModelId, sealed, write_plan
from offramp.runs import Exit
from offramp.timing import Constants
from tests.test_cli import SHARED, Shell

CASE = Case([[1, 2, 3, 4], [5, 6, 7, 8]], 3)
TEXTS = [[1, 2, 3], [4, 5, 6]]


def _sample(prefill: float, decode: float, outputs: list[list[int]] | None = None) -> Sample:
    return Sample(prefill, decode, 4, outputs or TEXTS, decode_bytes=8.0, predicted=decode)


def _contestant(name: str, samples: list[Sample], **facts: Any) -> Contestant:
    return Contestant(name, lambda _case: samples.pop(0), **{"kind": name, **facts})


def _run(contestants: list[Contestant], rounds: int) -> Race:
    return race(
        contestants,
        CASE,
        rounds,
        lambda: Ceiling(16.0, {"fp32": 2.0, "int8": 8.0}),
        lambda _name: None,
    )


def _rows(*turns: list[Sample], facts: list[dict[str, Any]]) -> list[Row]:
    """Return the rows of contestants A, B, ... with these turns; the first is the full depth."""
    warm = _sample(1e9, 1e9, [[0] * 3] * 2)
    contestants = [
        _contestant(chr(65 + i), [warm, *samples], **facts[i]) for i, samples in enumerate(turns)
    ]
    return rows(_run(contestants, len(turns[0])))


def test_everybody_has_a_turn_in_every_round() -> None:
    """A B C, then the machine, over and over; the first round warms up and is not kept."""
    order: list[str] = []

    def turn(name: str) -> Callable[[Case], Sample]:
        def take(_case: Case) -> Sample:
            order.append(name)
            return _sample(1, len(order))

        return take

    def machine() -> Ceiling:
        order.append(".")
        return Ceiling(1, {"fp32": 1, "int8": 1})

    ticks: list[str] = []
    contestants = [Contestant(name, turn(name), name) for name in "ABC"]
    run = race(contestants, CASE, 3, machine, ticks.append)
    assert "".join(order) == "ABC." * 4
    assert "".join(ticks) == "ABC" * 4
    assert [s.decode for s in run.samples[0]] == [5, 9, 13]
    assert len(run.ceilings) == 3


def test_a_turn_of_many_texts_is_their_sum() -> None:
    """Of seconds, tokens, bytes and work; what one part does not know, the turn does not."""
    parts = [
        Sample(1, 2, 3, [[1]], decode_bytes=5, decode_flops=7, predicted=9),
        Sample(10, 20, 30, [[2]], decode_bytes=50, predicted=90),
    ]
    assert together(parts) == Sample(11, 22, 33, [[1], [2]], decode_bytes=55, predicted=99)
    case = Case([[1, 2, 3], [4]], 5, alone=True)
    assert [part.prompts for part in case.parts] == [[[1, 2, 3]], [[4]]]
    assert (case.batch, case.read, case.context) == (1, 4, 2)


def test_who_fails_is_out_and_says_why() -> None:
    """After its warm-up, B fails once: it has no second chance, and the others go on."""
    calls: list[int] = []

    def fail(_case: Case) -> Sample:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return _sample(1, 1)

    full = _contestant("A", [_sample(1, 1)] * 4, full=True)
    shown = rows(_run([full, Contestant("B", fail, "B"), absent("C", "not installed")], 3))
    assert [row.reason for row in shown] == [None, "out of memory", "not installed"]
    assert [row.decode_tokens_per_second for row in shown] == [4, None, None]
    assert len(calls) == 2


@pytest.mark.parametrize("load", [(1, 1, 1), (1, 7, 2), (5, 1, 3)])
def test_a_busy_machine_does_not_change_ratios(load: tuple[int, ...]) -> None:
    """Whole rounds are slowed down; the ratio is taken within a round."""
    full = [_sample(2 * k, 3 * k) for k in load]
    other = [_sample(k, 2 * k) for k in load]
    first, second = _rows(full, other, facts=[{"full": True}, {}])
    assert (first.full, second.full) == ("A", "A")
    assert first.ratio_to_full == 1
    assert second.ratio_to_full == pytest.approx(1.5)
    assert second.ratio_quartiles == pytest.approx((1.5, 1.5))
    assert second.prefill_ratio_to_full == pytest.approx(2)
    assert second.predicted_ratio == pytest.approx(1.5)


def test_medians_quartiles_and_shares() -> None:
    """Of speeds, not of seconds; tokens of all texts; bytes against the same round's memory."""
    turns = [_sample(p, d) for p, d in ((8, 1), (4, 2), (2, 4), (1, 8), (0.5, 16))]
    [row] = _rows(turns, facts=[{}])
    assert row.prefill_tokens_per_second == 4
    assert row.prefill_quartiles == pytest.approx((2, 8))
    assert row.decode_tokens_per_second == 1
    assert row.decode_tokens_per_second_per_sequence == 0.5
    assert row.decode_quartiles == pytest.approx((0.5, 2))
    assert row.ceiling_share == 8 / 4 / 16
    assert row.prefill_ceiling_share is None
    assert row.ratio_to_full is None
    assert spread([3.0]) == (3.0, (3.0, 3.0))


@pytest.mark.parametrize(
    ("weights", "most"), [(None, 2), ("fp32", 2), ("bf16", 2), ("int8", 8), ("int4", 8)]
)
def test_reading_is_held_against_products_of_its_own_weights(
    weights: str | None, most: float
) -> None:
    """Bytes multiply several times as fast as floats, so a share of fp32's would exceed 1."""
    reading = dataclasses.replace(_sample(4, 1), prefill_flops=24.0)
    [row] = _rows([reading], facts=[{"weights": weights}])
    assert row.prefill_ceiling_share == 24 / 4 / most


ONE_EACH = Constants(
    layer=((1, 1.0),),
    pair=0.0,
    key=0.0,
    head=((1, 1.0),),
    fill=((1, 1.0),),
    path=((1, 2.0), (6, 7.0)),
    bare=((1, 1.0), (2, 2.0)),
    step=0.0,
    ask=0.0,
)
"""A second for each row of a layer or a head."""


def test_every_altered_token_is_counted() -> None:
    """Against ours at full depth of the same weights, else against generate; the worst round."""
    altered = [[1, 9, 3], [4, 5, 9]]
    wrong = [_sample(1, 1), _sample(1, 1, altered), _sample(1, 1)]
    right = [_sample(1, 1)] * 3
    cut = [_sample(1, 1, [[1, 2, 3], [4]])] * 3
    shown = _rows(
        *(right, wrong, cut, right),
        facts=[
            {"full": True, "weights": "int4"},
            {"weights": "int4"},
            {"weights": "fp32"},
            {"weights": "fp32", "kind": "hf"},
        ],
    )
    assert [(row.reference, row.mismatches) for row in shown] == [
        *(("D", 0), ("A", 2), ("D", 2), (None, None))
    ]
    assert shown[1].compared == 6
    assert mismatches([[1, 2]], [[2, 1]]) == 2


def test_our_turns_are_timed_and_counted_apart(tiny: offramp.Model) -> None:
    """Tokens are those of generate; the bytes are those of the decoding steps alone."""
    case = own.make_case(tiny.tokenizer, 2, 20, 6)
    assert [len(prompt) for prompt in case.prompts] == [20, 20]
    assert case.prompts[0] != case.prompts[1]
    sample = own.take_turn(tiny.backbone, offramp.Plan(), ONE_EACH, case)
    text = tiny.tokenizer.decode(case.prompts[1])
    options = {"max_new_tokens": 6, "raw": True}
    assert sample.outputs[1] == tiny.generate(text, **options).outputs[0].token_ids
    shape = tiny.backbone.shape
    work = Meter(layer_passes=5 * 6, head_passes=5)
    keys = 2 * 6 * sum(range(21, 26)) * 2 * 16 * 4  # texts, layers, positions, k and v, fp32
    assert sample.decode_bytes == weight_bytes(work, shape) + keys
    assert sample.decoded == 10
    assert sample.predicted == 5 * (6 * 2 + 2)  # steps of two rows: layers and a head


ENGINE = """
import json, os, sys, time
turns = 0
for line in sys.stdin:
    order = json.loads(line)
    if "engine" in order:
        engine = order["engine"]
        open(PIDS, "a").write(f"{os.getpid()} {os.getcwd()}\\n")
        answer = {"version": "1", "weights": "fp32", "bytes": 100, "note": "fake"}
        if engine == "ctranslate2":
            answer = {"missing": "No module named 'ctranslate2'"}
    else:
        turns += 1
        if engine == "economize" and turns == 2:
            print("out of luck", file=sys.stderr)
            os._exit(3)
        count = order["tokens"]
        outputs = [[0] * count for _ in order["prompts"]]
        answer = {"prefill": 1.0, "decode": 2.0, "decoded": 6, "outputs": outputs}
    print(json.dumps(answer), flush=True)
time.sleep(600)  # must be ended; the real one ends with stdin
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a fake engine in the worker's place; return the file it writes its pid and folder to."""
    script, pids = tmp_path / "fake.py", tmp_path / "pids"
    script.write_text(f"PIDS = {str(pids)!r}\n{ENGINE}")
    monkeypatch.setattr(peers, "WORKER", script)
    return pids


def _all_gone(pids: Path, count: int) -> None:
    lines = [line.split() for line in pids.read_text().splitlines()]
    assert len(lines) == count
    for pid, folder in lines:
        assert not Path(folder).exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell with its output captured."""
    return Shell(capsys, monkeypatch)


SMALL = ("--context", "12", "--tokens", "4", "--rounds", "2", "--threads", "1")


def test_a_peer_is_timed_dead_or_missing_but_never_absent(
    shell: Shell, checkpoint: Path, fake: Path, tiny: offramp.Model
) -> None:
    """By name each has its row; the dead one says how it ended, and no process is left."""
    engines = "llama.cpp,economize,ctranslate2"
    record = shell.json(
        *("bench", checkpoint, *SMALL, "--against", engines, "--peers", sys.executable)
    )
    full, llama, dead, missing = record["rows"]
    case = own.make_case(tiny.tokenizer, 1, 12, 4)
    [text] = own.take_turn(tiny.backbone, offramp.Plan(), ONE_EACH, case).outputs
    assert llama["mismatches"] == sum(token != 0 for token in text) > 0
    assert llama["reference"] == full["name"] == "fast fp32 full"
    assert llama["decode_tokens_per_second"] == 3
    assert llama["prefill_tokens_per_second"] == 12
    assert dead["reason"] == "its process ended (status 3): out of luck"
    assert missing["reason"] == "No module named 'ctranslate2'"
    assert record["versions"]["llama.cpp"] == "1"
    _all_gone(fake, 3)
    status, out, _ = shell(
        *("bench", checkpoint, *SMALL, "--against", engines, "--peers", sys.executable)
    )
    assert status == 0
    assert "economize fp32: not timed: its process ended" in out
    assert "ctranslate2: not timed: No module named" in out


def test_by_default_those_that_are_there_compete(fake: Path) -> None:
    """Without a peers' environment, and without a name, nobody is missed; by name, one is."""
    order = peers.opening_order("none", 16, None, False)
    with ExitStack() as stack:
        found, _ = peers.peer_contestants(None, Path(sys.executable), order, stack)
        assert [one.kind for one in found] == ["hf", "hf-early-exit", "llama.cpp", "economize"]
    _all_gone(fake, 5)
    with ExitStack() as stack:
        assert len(peers.peer_contestants(None, None, order, stack)[0]) == 2
        [one], _ = peers.peer_contestants(["economize"], None, order, stack)
        with pytest.raises(offramp.OfframpError, match="make peers"):
            one.measure(CASE)


def test_an_interruption_leaves_nothing(
    shell: Shell, checkpoint: Path, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process, no folder, no half-written file; status 130."""

    def interrupt(*_: object) -> Sample:
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "take_turn", interrupt)
    out, names = tmp_path / "out.json", "llama.cpp,economize"
    status, _, err = shell(
        *("bench", checkpoint, *SMALL, "--against", names, "--peers", sys.executable),
        *("--out", out),
    )
    assert (status, "interrupted" in err, out.exists()) == (130, True, False)
    _all_gone(fake, 2)


@pytest.mark.timeout(600)
def test_generate_is_a_contestant(shell: Shell, checkpoint: Path) -> None:
    """Plans of ours and Hugging Face's two ways, same prompts, same tokens, two cases; all keys."""
    record = shell.json(
        *("bench", checkpoint, *SMALL, "--batch-size", "1,2", "--backbone", "fast,hf"),
        *("--exit", 2, "--draft", 3, "--against", "hf,hf-early-exit"),
    )
    assert record.keys() >= SHARED - {"backbone", "weights"} | {"rows"}  # those are of each row
    assert record["machine"].keys() >= {"memory_gb_per_second", "int8_gflops", "threads"}
    assert len(record["plan"]) == 3
    table = {(row["batch"], row["name"]): row for row in record["rows"]}
    assert len(table) == 16
    assert all(row.keys() >= {"predicted_ratio", "ceiling_share"} for row in table.values())
    for (batch, name), row in table.items():
        if (batch, name) == (2, "hf-early-exit fp32"):
            assert "batch_size = 1" in row["reason"]
            continue
        assert row["reason"] is None
        assert row["decode_tokens_per_second"] > 0
        assert row["lossless"] is ("first" not in name)
        assert (row["mismatches"] == 0) is row["lossless"]
    for kind in ("fast", "hf"):
        assert table[1, f"{kind} fp32 full"]["predicted_ratio"] == 1
        assert table[1, f"{kind} fp32 first 2"]["predicted_ratio"] > 1  # in measured seconds
        assert table[1, f"{kind} fp32 first 2"]["full"] == f"{kind} fp32 full"


def test_prompts_of_any_length_are_answered_one_by_one(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """One row for all of them: each is timed alone, all tokens are compared, work is counted."""
    (tmp_path / "mine.txt").write_text("One fish.\nTwo fish swim away.\nThree.\n")
    record = shell.json(
        *("bench", checkpoint, "--prompts", tmp_path / "mine.txt", "--limit", 2, "--raw"),
        *("--tokens", 4, "--rounds", 2, "--threads", 1, "--exit", 2, "--against", "hf"),
    )
    full, shallow, generate = record["rows"]
    assert (full["batch"], full["compared"]) == (1, 8)
    assert full["mismatches"] == generate["mismatches"] == 0
    assert full["operations_to_full"] == 1 > shallow["operations_to_full"] > 0
    assert generate["operations_to_full"] is None
    shell.refused(2, "--context", "bench", "--prompts", tmp_path / "mine.txt", "--context", 9)


def test_a_certificate_is_of_one_format(
    shell: Shell, checkpoint: Path, tiny: offramp.Model, tmp_path: Path
) -> None:
    """Found by the shipped plan: it could not be timed in its own format, as a base held fp32."""
    facts = tiny.backbone
    plan = sealed(
        offramp.Plan(
            model=ModelId(
                name="tiny", num_layers=facts.shape.num_layers, fingerprint=facts.fingerprint
            ),
            run=Exit(signal="max_prob", thresholds={2: 0.5}),
        ),
        Certificate(
            risk="disagreement",
            alpha=0.1,
            delta=0.1,
            method="binomial",
            n=99,
            value=0.01,
            settings=1,
            cost=0.9,
            measured=False,
            weights="int8",
            data={},
            seed=0,
            held_out=HeldOut(n=9, risk=0.05),
        ),
    )
    write_plan(tmp_path / "plan.json", plan)
    record = shell.json(
        *("bench", checkpoint, *SMALL, "--against", "none", "--weights", "int8,fp32"),
        *("--plan", tmp_path / "plan.json"),
    )
    _, timed, _, refused = record["rows"]
    assert timed["reason"] is None
    assert "certified with int8" in refused["reason"]


def test_weights_that_a_backbone_cannot_hold_are_a_row(shell: Shell, checkpoint: Path) -> None:
    """With the reason; if nobody can be timed, that is an error."""
    base = ["bench", checkpoint, *SMALL, "--against", "none", "--backbone", "hf", "--weights"]
    timed, refused = shell.json(*base, "bf16,int4")["rows"]
    assert (timed["name"], timed["reason"]) == ("hf bf16 full", None)
    assert "fast backbone" in refused["reason"]
    status, _, err = shell(*base, "int4")
    assert status == 1
    assert "nothing could be timed" in err


def test_auto_takes_no_other_weights_than_those_asked_for(
    tiny: offramp.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no kernels, fp32 runs on the model's own modules, and int4 is refused."""

    def refuse(*_: object) -> None:
        raise UnavailableError("no compiler")

    monkeypatch.setattr(own, "open_fast", refuse)
    plans = [offramp.Plan()]
    [plain] = own.own_contestants(tiny, None, "auto", "fp32", plans)
    assert (plain.name, plain.kind) == ("hf fp32 full", "own hf")
    for kind, form in (("auto", "int4"), ("fast", "fp32")):
        [refused] = own.own_contestants(tiny, None, kind, form, plans)  # type: ignore[arg-type]
        with pytest.raises(offramp.OfframpError, match="no compiler"):
            refused.measure(CASE)


def test_the_worker_parts_reading_from_writing() -> None:
    """The first tokens end the reading, however many come at once; the rest are decoded."""

    class Engine:
        def write(self, prompts: list[list[int]], tokens: int, watch: Watch) -> list[list[int]]:
            for moment, written in ((0.05, 3), (0.01, 4), (0.01, tokens)):
                time.sleep(moment)
                assert watch(written) is False
            return [[0] * tokens for _ in prompts]

    answer = run(Engine(), [[1], [2]], 8)
    assert answer["decoded"] == 2 * (8 - 3)
    assert answer["prefill"] >= 0.05 > answer["decode"] >= 0.02
    assert answer["outputs"] == [[0] * 8] * 2


def test_bad_options_fail_before_a_model_loads(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("offramp.model.load", load)
    for option, value in {
        "--batch-size": "1,0",
        "--context": "256,x",
        "--weights": "int4,int3",
        "--backbone": "slow",
        "--against": "hf,vllm",
        "--peers": str(tmp_path / "python"),
        "--threshold": "max_prob=x",
    }.items():
        shell.refused(2, f"{option} ", "bench", option, value)
    shell.refused(2, "more", "bench", "--draft", "0")
    for option, least in (("--tokens", 2), ("--rounds", 1), ("--threads", 1)):
        shell.refused(2, f"greater than or equal to {least}", "bench", option, least - 1)
    shell.refused(1, "cannot read the plan", "bench", "--plan", tmp_path / "none.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    shell.refused(1, "offramp[plot]", "bench", "--plot", tmp_path / "plot.png")


def test_what_the_model_cannot_do_is_refused(shell: Shell, checkpoint: Path) -> None:
    """Before anything is timed."""
    base = ("bench", checkpoint, "--against", "none")
    shell.refused(2, "reads at most 256", *base, "--context", 250)
    shell.refused(2, "path", *base, "--context", 20, "--exit", 7)


def test_the_plot_is_a_picture(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Written whole, a panel per case."""
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    base = ("bench", checkpoint, *SMALL, "--against", "none")
    shell.json(*base, "--batch-size", "1,2", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_the_engines_named_are_the_engines_there_are() -> None:
    """The command line, the library and the worker know the same."""
    shown = import_module("offramp.cli.bench")._ENGINES
    assert set(ENGINES) == set(shown) == {*peers.OURS, *peers.THEIRS}
