"""The command line: what it prints, how it ends, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offramp
from offramp import cli
from offramp.timing import Constants
from offramp.trace import load_trace
from tests.conftest import save_tiny


class Shell:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.capsys, self.patch = capsys, patch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Return (status, stdout, stderr)."""
        self.patch.setattr(sys, "argv", ["offramp", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return status, out, err

    def refused(self, status: int, words: str, *arguments: object) -> None:
        """Hold that the command ends so, with one line that has these words, and no traceback."""
        got, out, err = self(*arguments)
        assert (got, out) == (status, "")
        assert words in err
        assert err.startswith("offramp: ")
        assert err.count("\n") == 1

    def json(self, *arguments: object) -> dict[str, Any]:
        """Return the JSON object on the last line of stdout."""
        status, out, _ = self(*arguments, "--json")
        assert status == 0
        record: dict[str, Any] = json.loads(out.splitlines()[-1])
        return record


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell with its output captured."""
    return Shell(capsys, monkeypatch)


SHARED = {"model", "plan", "seed", "backbone", "weights", "versions", "machine"}
COST = {"tokens", "layer_passes", "layer_tokens", "head_rows", "fill_rows", "flops_ratio"} | {
    "bytes_ratio",
    "seconds",
    "tokens_per_second",
    "mean_depth",
    "depth_histogram",
    "predicted_seconds",
    "predicted_ratio",
}


def test_generate_prints_the_text_and_its_cost(shell: Shell, checkpoint: Path) -> None:
    """The text on stdout, the table on stderr."""
    status, out, err = shell("generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 8)
    assert status == 0
    assert out.strip()
    assert "operations / full depth" in err


def test_generate_json_is_one_line_with_the_shared_keys(shell: Shell, checkpoint: Path) -> None:
    """And it says what the library says."""
    record = shell.json("generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 8)
    assert record.keys() >= SHARED | COST | {"outputs"}
    [output] = record["outputs"]
    assert output.keys() >= {"prompt", "text", "token_ids", "depths", "finish_reason"}
    again = offramp.load(str(checkpoint)).generate("hi", max_new_tokens=8)
    assert again.outputs[0].token_ids == output["token_ids"]


def test_a_model_of_one_layer_has_no_exit(shell: Shell, tmp_path: Path) -> None:
    """It generates and traces; there is nothing to inspect, and that is one line."""
    folder = save_tiny(tmp_path / "one", layers=1)
    short = ("--prompt", "hi", "--max-new-tokens", 4)
    assert shell("generate", folder, *short)[0] == 0
    assert shell("trace", folder, *short)[0] == 0
    shell.refused(1, "one layer", "inspect", folder)


def test_a_prompt_on_stdin_must_be_text(
    shell: Shell, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not UTF-8 is refused in one line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    shell.refused(2, "not UTF-8", "generate", checkpoint, "--prompt", "-")


def test_every_way_of_running_runs(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Drafts are lossless; sub-models and thresholds report their depths; a plan file is obeyed."""
    base = ["generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 10]
    plain = shell.json(*base)
    draft = shell.json(*base, "--draft", 3, "--draft-tokens", 2, "--draft-confidence", 0.1)
    assert plain["outputs"][0]["token_ids"] == draft["outputs"][0]["token_ids"]
    assert draft["drafted"] > 0
    short = shell.json(*base, "--draft", 3, "--head", "shortlist:99")
    assert plain["outputs"][0]["token_ids"] == short["outputs"][0]["token_ids"]
    assert short["plan"]["run"]["head"] == {"kind": "shortlist", "size": 99}
    assert short["check_rows"] == short["drafted"] > 0
    adapted = shell.json(*base, "--adapt", "2,5")
    assert plain["outputs"][0]["token_ids"] == adapted["outputs"][0]["token_ids"]
    assert adapted["plan"]["run"]["drafts"] == [[0, 1], [0, 1, 2, 3, 4]]
    assert set(shell.json(*base, "--exit", 2)["outputs"][0]["depths"]) == {2}
    left = shell.json(*base, "--threshold", "max_prob=2:0.01,4:0.02")
    assert set(left["outputs"][0]["depths"]) <= {2, 4, 6}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(left["plan"]))
    assert shell.json(*base, "--plan", plan)["outputs"] == left["outputs"]
    copied = shell.json(*base, "--threshold", "fixed=2:1", "--kv", "copy")
    assert copied["fill_rows"] == 9 * 4  # the prompt runs whole; nine tokens skip four layers


def test_a_file_of_prompts_is_answered_in_order(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """In batches, like each alone; --out holds the same record."""
    file = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"instruction": "b", "input": "c"},
        {"instruction": "long one"},
    ]
    rows.append({"messages": [{"role": "user", "content": "d"}]})
    file.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.json"
    base = ["generate", checkpoint, "--max-new-tokens", 6]
    together = shell.json(*base, "--prompts", file, "--batch-size", 3, "--out", out)
    assert len(together["outputs"]) == 4
    assert json.loads(out.read_text())["outputs"] == together["outputs"]
    alone = shell.json(*base, "--prompt", "a")
    assert alone["outputs"][0]["token_ids"] == together["outputs"][0]["token_ids"]
    assert len(shell.json(*base, "--prompts", file, "--limit", 2)["outputs"]) == 2


def test_sampling_is_reproducible_by_seed(shell: Shell, checkpoint: Path) -> None:
    """And another seed gives another text."""
    base = ["generate", checkpoint, "--prompt", "hi", "--temperature", 1.5, "--max-new-tokens", 12]
    first, second = (shell.json(*base, "--seed", 7) for _ in range(2))
    assert first["outputs"] == second["outputs"]
    assert first["outputs"] != shell.json(*base, "--seed", 8)["outputs"]


def test_a_stop_string_ends_the_answer_before_it(shell: Shell, checkpoint: Path) -> None:
    """It is no part of the text."""
    base = ["generate", checkpoint, "--prompt", "hello there", "--max-new-tokens", 40]
    whole = shell.json(*base)["outputs"][0]["text"]
    stop = whole[5:7]
    output = shell.json(*base, "--stop", stop)["outputs"][0]
    assert output["text"] == whole[: whole.index(stop)]
    assert output["finish_reason"] == "stop"


def test_inspect_gives_a_verdict(shell: Shell, checkpoint: Path) -> None:
    """A random model is not worth it, and is told what to do."""
    record = shell.json("inspect", checkpoint, "--prompt", "hi", "--max-new-tokens", 12)
    assert record.keys() >= SHARED | {"supported", "verdict", "recipe", "rows", "check_in_layers"}
    assert len(record["rows"]) == 5
    status, out, _ = shell("inspect", checkpoint, "--prompt", "hi", "--max-new-tokens", 12)
    assert status == 0
    assert "Verdict:" in out
    assert [row["check"] for row in record["checks"]] == ["full"]  # nothing is cheaper here
    assert record["verdict"].split(":")[0] in out


def test_inspect_judges_by_time_and_generate_predicts_from_then_on(
    shell: Shell, checkpoint: Path, own_timings: Path
) -> None:
    """``generate`` measures nothing itself; what ``inspect`` measured it finds, per backbone."""
    base = ["generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 4, "--backbone"]
    assert shell.json(*base, "hf")["predicted_seconds"] is None
    assert not list(own_timings.iterdir())
    inspect = ["inspect", checkpoint, "--prompt", "hi", "--max-new-tokens", 4]
    record = shell.json(*inspect, "--backbone", "hf")
    assert record["timing"].keys() >= {
        "layer_microseconds",
        "head_microseconds",
        "key_microseconds",
    }
    assert (record["backbone"], record["weights"]) == ("hf", "fp32")
    assert " the time" in record["verdict"]
    assert len(list(own_timings.iterdir())) == 1
    assert shell.json(*inspect, "--backbone", "hf")["timing"] == record["timing"]  # not again
    known = shell.json(*base, "hf")
    assert known["predicted_seconds"] > 0
    assert known["predicted_ratio"] == 1
    assert shell.json(*base, "hf", "--exit", 2)["predicted_ratio"] < 1
    assert shell.json(*base, "fast", "--weights", "int8")["predicted_seconds"] is None
    assert "seconds predicted" in shell(*base, "hf")[2]
    assert "Measured here" in shell(*inspect, "--backbone", "hf")[1]


@pytest.mark.parametrize(("head", "words"), [(1e-6, ""), (1.0, "cannot pay for itself")])
def test_a_plan_that_cannot_pay_draws_one_line(
    shell: Shell, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, head: float, words: str
) -> None:
    """On stderr, and only where times are known; every draft costs a head that takes a second."""
    base = ["generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 4, "--json"]
    draft = [*base, "--draft", 5]
    assert shell(*draft)[2] == ""
    layer = ((1, 1e-3), (8, 1.1e-3))
    paths = {"path": ((1, head + 1e-3), (6, head + 6e-3)), "bare": ((1, 1e-3), (2, 2e-3))}
    known = Constants(
        layer=layer, pair=0, key=0, head=((1, head),), fill=layer, step=0, ask=0, **paths
    )
    monkeypatch.setattr("offramp.timing.known", lambda _backbone: known)
    assert shell(*base)[::2] == (0, "")
    status, _, err = shell(*draft)
    assert status == 0
    assert words in err
    assert err.count("\n") == bool(words)


def test_trace_records_and_replays(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """The replay is what generation with that threshold does on the text it would have seen."""
    file = tmp_path / "t.safetensors"
    base = ["trace", checkpoint, "--prompt", "hi", "--max-new-tokens", 12, "--exits", "2,4"]
    record = shell.json(*base, "--threshold", "margin=2:0.05,4:0.05", "--out", file)
    assert [row["depth"] for row in record["rows"]] == [2, 4, 6]
    assert sum(record["replay"]["depth_histogram"].values()) == record["tokens"] == 12
    assert load_trace(file).exits == (2, 4)
    given = shell.json("trace", checkpoint, "--given", "--prompt", "some text", "--exits", "3")
    assert given["tokens"] == len("some text") - 1
    status, out, _ = shell(*base, "--threshold", "margin=2:0.05,4:0.05")
    assert status == 0
    assert "would leave at depth" in out


def test_exits_are_checked_as_told(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Each check runs, is counted apart, replays in a trace, and is part of the plan."""
    base = [checkpoint, "--prompt", "hi", "--max-new-tokens", 10]
    full = shell.json("generate", *base, "--threshold", "margin=2:0.05,4:0.05")
    assert full["plan"]["run"]["check"] == {"kind": "full"}
    for check, kind in (
        ("full", "full"),
        ("shortlist:257", "shortlist"),
        ("low-rank:32", "low_rank"),
    ):
        options = ["--threshold", "margin=2:0.05,4:0.05", "--check", check]
        record = shell.json("generate", *base, *options)
        assert record["plan"]["run"]["check"]["kind"] == kind
        assert record["outputs"] == full["outputs"]  # nothing is left out by any of them
        assert (record["check_rows"] == 0) == (kind == "full")
        file = tmp_path / "t.safetensors"
        assert shell.json("trace", *base, *options, "--exits", "2,4", "--out", file)["replay"]
        assert load_trace(file).check == check
    path = tmp_path / "g.safetensors"
    texts = [(list(b"some text of bytes, long enough"), 1)]
    backbone = offramp.load(str(checkpoint)).backbone
    offramp.fit_gate(offramp.record(backbone, texts, (2, 4), keep_hidden=True)).save(path)
    options = ["--threshold", "gate=2:0.5,4:0.5", "--check", f"gate:{path}"]
    record = shell.json("generate", *base, *options)
    assert (record["head_rows"], record["check_rows"]) == (10, 0)
    assert shell.json("trace", *base, *options)["replay"]["depth_histogram"]


def test_version_and_help(shell: Shell) -> None:
    """Help teaches by an example."""
    assert shell("--version")[1].strip() == offramp.__version__
    for verb in ("generate", "inspect", "trace"):
        status, out, _ = shell(verb, "--help")
        assert status == 0
        assert "--json" in out


def test_wrong_usage_is_found_before_a_model_loads(shell: Shell, tmp_path: Path) -> None:
    """Status 2; the model named does not even exist."""
    base = ["generate", tmp_path / "nowhere", "--prompt", "hi"]
    wrong: dict[str, list[object]] = {
        "there is no prompt": ["generate", tmp_path / "nowhere"],
        "the prompt is empty": ["generate", "--prompt", "  "],
        "exclude each other": [*base, "--draft", 3, "--exit", 2],
        "temperature": [*base, "--temperature", -1],
        "top-k": [*base, "--top-k", -1],
        "top-p": [*base, "--top-p", 0],
        "repetition penalty": [*base, "--repetition-penalty", 0],
        "SIGNAL=DEPTH:VALUE": [*base, "--threshold", "max_prob"],
        "each depth once": [*base, "--threshold", "max_prob=3:0.5,3:0.6"],
        "finite": [*base, "--threshold", "max_prob=3:nan"],
        "not in the range": [*base, "--threshold", "max_prob=3:1.5"],
        "unknown signal": [*base, "--threshold", "mood=3:0.5"],
        "give one": [*base, "--check", "shortlist:9"],
        "or --adapt; give one": [*base, "--head", "full"],
        "--check 'half'": [*base, "--threshold", "max_prob=3:0.5", "--check", "half"],
        "--check 'full:3'": [*base, "--threshold", "max_prob=3:0.5", "--check", "full:3"],
        "--check 'shortlist:1'": [*base, "--threshold", "max_prob=3:0.5", "--check", "shortlist:1"],
        "--check 'low-rank:-2'": [*base, "--threshold", "max_prob=3:0.5", "--check", "low-rank:-2"],
        "--check 'gate:'": [*base, "--threshold", "gate=3:0.5", "--check", "gate:"],
        "a gate has no other signal": [*base, "--threshold", "entropy=3:1", "--check", "gate:x"],
        "does not go with the check full": [*base, "--threshold", "gate=3:0.5"],
        "is outside 1": [*base, "--exit", 0],
        "1 layer or more": [*base, "--draft", 0],
        "different numbers": [*base, "--adapt", "3,3"],
        "--max-new-tokens": [*base, "--max-new-tokens", 0],
        "--batch-size": [*base, "--batch-size", 0],
        "--draft-tokens": [*base, "--draft-tokens", 0],
        "--weights": [*base, "--weights", "fp7"],
        "no device 'gpu'": [*base, "--device", "gpu"],
        "No such option": [*base, "--frobnicate"],
        "write depths": ["trace", "--prompt", "hi", "--exits", "a,b"],
        "greater than or equal": [*base, "--max-new-tokens", -3],
    }
    for words, options in wrong.items():
        shell.refused(2, words, *options)


def test_what_only_the_model_can_refuse(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Status 2, after loading and before running."""
    base = ["generate", checkpoint, "--prompt", "hi"]
    shell.refused(2, "leaves the model's layers", *base, "--exit", 7)
    shell.refused(2, "some but not all", *base, "--draft", 6)
    shell.refused(2, "outside 1 to 5", *base, "--threshold", "max_prob=6:0.5")
    low = ["--threshold", "max_prob=3:0.5", "--check"]
    shell.refused(2, "longer than the vocabulary of 257", *base, *low, "shortlist:258")
    shell.refused(2, "the model is 32 wide", *base, *low, "low-rank:33")
    gate = ["--threshold", "gate=3:0.5", "--check", f"gate:{tmp_path / 'none'}"]
    shell.refused(1, "cannot read the gates", "generate", tmp_path, "--prompt", "a", *gate)
    shell.refused(2, "256 including its answer", "generate", checkpoint, "--prompt", "x" * 300)
    foreign = tmp_path / "plan.json"
    other = {"name": "other", "num_layers": 6, "fingerprint": "00"}
    foreign.write_text(json.dumps({"model": other, "run": {"kind": "full"}}))
    shell.refused(2, "made for other", *base, "--plan", foreign)


def test_models_that_cannot_be_opened(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Status 1 and the remedy."""

    def broken(name: str) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / name))

    run = ["--prompt", "hi"]
    shell.refused(1, "no local folder", "generate", tmp_path / "nowhere", *run)
    shell.refused(1, "no file", "generate", tmp_path / "no.gguf", *run)
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all")
    shell.refused(1, "no GGUF file", "generate", tmp_path / "bad.gguf", *run)

    empty = broken("empty")
    (empty / "model.safetensors").unlink()
    shell.refused(1, "no *.safetensors weights", "generate", empty, *run)

    pickled = broken("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    shell.refused(1, "pickle", "generate", pickled, *run)

    corrupt = broken("corrupt")
    whole = (corrupt / "model.safetensors").read_bytes()
    (corrupt / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    shell.refused(1, "cannot be read", "generate", corrupt, *run)

    missing = broken("missing")
    tensors = load_file(missing / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, missing / "model.safetensors", {"format": "pt"})
    shell.refused(1, "incomplete", "generate", missing, *run)

    encoder = broken("encoder")
    (encoder / "config.json").write_text('{"model_type": "t5"}')
    shell.refused(1, "not a causal language model", "generate", encoder, *run)

    nonsense = broken("nonsense")
    (nonsense / "config.json").write_text("{")
    shell.refused(1, "config.json", "generate", nonsense, *run)


def test_prompt_files_name_the_line(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Before anything is generated."""
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": \n')
    shell.refused(1, "line 2: not valid JSON", "generate", checkpoint, "--prompts", file)
    file.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n')
    shell.refused(1, "line 3: not valid UTF-8", "generate", checkpoint, "--prompts", file)
    shell.refused(1, "cannot read", "generate", checkpoint, "--prompts", tmp_path / "none.txt")
    shell.refused(1, "cannot read", "generate", checkpoint, "--prompt", "a", "--plan", "none.json")


def test_an_unwritable_result_leaves_no_half_file(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """The folder does not exist; nothing is left behind, and the reason is one line."""
    out = tmp_path / "missing" / "out.json"
    status, printed, err = shell(
        "generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 2, "--out", out, "--json"
    )
    assert json.loads(printed)["tokens"] == 2  # the run itself is not lost
    assert status == 1
    assert "cannot write" in err
    assert not list(tmp_path.iterdir())


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    """A model may write escape sequences; they are shown, not sent."""
    from offramp.cli.output import depth_text
    from offramp.shown import visible

    assert visible("a\x1b[2Jb\x07\n\tc") == "a\\x1b[2Jb\\x07\n\tc"
    assert visible("\xa0é😀\u202e") == "\xa0é😀\\x202e"
    assert "\x1b" not in depth_text("\x1b]0;title\x07", 3, 6).plain


def test_interruption_ends_with_one_line(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C while generating: status 130, no traceback, no output file."""
    out = tmp_path / "out.json"
    code = (
        "import sys, offramp.model as m\n"
        "from offramp import cli\n"
        "def stop(self):\n    raise KeyboardInterrupt\n"
        "m.Stream.__iter__ = stop\n"
        f"sys.argv = ['offramp', 'generate', {str(checkpoint)!r}, '--prompt', 'hi', "
        f"'--out', {str(out)!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_exception_inside_a_layer_leaves_the_model_usable(tiny: offramp.Model) -> None:
    """Nothing stays stubbed, truncated or half-filled: the next answer is the same as before."""
    expected = tiny.generate("hello", max_new_tokens=10)
    layer = tiny.backbone.adapter.layers[3]  # type: ignore[attr-defined]
    calls = 0

    def fail(*_args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    hook = layer.self_attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.generate("hello", max_new_tokens=10)
    hook.remove()
    model = tiny.backbone.model  # type: ignore[attr-defined]
    assert not [m for m in model.modules() if "forward" in m.__dict__]
    assert tiny.generate("hello", max_new_tokens=10).outputs == expected.outputs
    ids = torch.tensor([tiny.tokenizer("hello")["input_ids"]])
    assert model(ids).logits.isfinite().all()
