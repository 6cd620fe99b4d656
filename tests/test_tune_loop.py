"""A tuning run: what it trains, that nothing is lost when it is killed, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

import offramp
from offramp import files
from offramp.decode import decode
from offramp.errors import OfframpError, UsageError
from offramp.hf.backbone import fingerprint
from offramp.hf.tuned import load_tuned
from offramp.sketch import keys, sketched
from offramp.tune import answers, gradients, loop, run, state
from offramp.tune.data import read_examples
from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.recipes import Moment, registry
from offramp.tune.report import judge
from offramp.tune.run import hold_out, tune
from offramp.tune.settings import Settings
from tests.conftest import save_tiny

WORDS = ("cat", "mat", "bird", "tree", "boat", "old", "nine", "small")


def settings(recipe: str = "lite", **changes: Any) -> Settings:
    """Return the settings of a run of nine steps."""
    made: dict[str, Any] = {
        "recipe": recipe,
        "exits": () if recipe in ("sft", "skip") else (2, 4),
        "readout": "block" if recipe == "heads" else "shared",
        "learning_rate": 1e-3,
        "length": 64,
        "rows": 3,
        "rows_at_once": 2,
        "held_out": 4,
        "precision": "fp32",
    }
    return Settings.model_validate({**made, **changes})


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs; one test draws them."""
    if "pictures" not in request.node.name:
        for name in ("draw", "draw_reliability"):
            monkeypatch.setattr(run, name, lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of rows that can be learnt."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for _ in range(50):
        word = draw.choice(WORDS)
        lines.append(json.dumps({"prompt": f"say {word}:", "completion": f" {word} {word}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    """Return what a tuned folder holds."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def command(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a run like ``settings()``'s."""
    options = "--recipe lite --exits 2,4 --learning-rate 1e-3 --length 64 --rows 3 --rows-at-once 2"
    fixed = [*options.split(), "--held-out", "4", "--precision", "fp32", "--save-every", "1"]
    named = ["tune", str(model), "--data", str(rows), "--out", str(out)]
    return [*named, *fixed, *more]


@pytest.mark.parametrize("recipe", sorted(registry()))
def test_a_recipe_trains_what_it_says_and_leaves_the_rest(
    recipe: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Losses of the exits fall; with a frozen model its weights are not even written."""
    out = tmp_path / "out"
    tuned = tune(str(model), [str(rows)], settings(recipe, epochs=6), out)
    old, new = tuned.before["held out"], tuned.after["held out"]
    assert [row["depth"] for row in new] == [*tuned.card.exits, 6]
    if recipe == "gates":
        assert set(weights(out)) == {"weights", "biases"}
        assert new == old, "the model is bit for bit what it was"
    elif recipe == "heads":
        assert set(weights(out)) == set(load_file(out / "readouts.safetensors"))
        assert new[-1] == old[-1], "the full depth is bit for bit what it was"
        assert all(n["agreement"] > o["agreement"] for n, o in zip(new[:-1], old[:-1], strict=True))
    else:
        assert all(n["loss"] < o["loss"] for n, o in zip(new, old, strict=True))


def test_every_depth_learns_only_where_it_is_taught(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """LITE lowers the loss at its exits far below what ordinary fine-tuning leaves there."""
    watched = {"held_out": 10, "epochs": 4}
    plain = tune(
        str(model), [str(rows)], settings("sft", **watched), tmp_path / "sft", watch=[str(rows)]
    )
    lite = tune(str(model), [str(rows)], settings("lite", **watched), tmp_path / "lite")
    assert plain.after["held out"][-1]["loss"] < plain.before["held out"][-1]["loss"]
    assert {"held out", rows.name} == set(plain.after)
    gain = [
        old["loss"] - new["loss"]
        for old, new in zip(lite.before["held out"], lite.after["held out"], strict=True)
    ]
    assert min(gain) > 0


@pytest.mark.parametrize("each_step", ["all", "rotate", "sample"])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_ways_of_choosing_exits_have_one_mean(
    each_step: str, distill: float, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Whichever exits a step trains, all are trained over a run, and losses fall."""
    chosen = settings("sorted", each_step=each_step, distill=distill, epochs=4)
    tuned = tune(str(model), [str(rows)], chosen, tmp_path / "out")
    pairs = zip(tuned.before["held out"], tuned.after["held out"], strict=True)
    assert all(new["loss"] < old["loss"] for old, new in pairs)


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """kill -9 at any moment: the same command ends bit for bit where an unbroken run does."""
    unbroken = tune(str(model), [str(rows)], settings(epochs=2), tmp_path / "unbroken")
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    asked = [sys.executable, "-m", "offramp.cli", *command(model, rows, out, "--epochs", "2")]
    draw = random.Random(7)
    for _ in range(2):
        before = _lines(out)
        with subprocess.Popen(asked, env=environment, stderr=subprocess.DEVNULL) as process:
            while _lines(out) < before + 3 and process.poll() is None:
                time.sleep(0.005)
            time.sleep(draw.random() * 0.02)
            process.send_signal(signal.SIGKILL)
    assert not (out / "offramp.json").exists(), "killed too late to show anything"
    subprocess.run(asked, env=environment, check=True, capture_output=True)
    found, expected = weights(out), weights(unbroken.folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "the log tells every step once"


def _lines(out: Path) -> int:
    log = out / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_processes_train_what_one_does(model: Path, rows: Path, tmp_path: Path) -> None:
    """Gradients of a step are those of all its rows, however they are divided (gloo)."""
    alone = tune(str(model), [str(rows)], settings(), tmp_path / "alone")
    out = tmp_path / "both"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--main_process_port", str(random.randrange(20000, 60000))]
    asked = [*launch, *port, "-m", "offramp.cli", *command(model, rows, out, "--json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = done.stdout.splitlines()
    assert json.loads(said)["out"] == str(out), "one of them reports"
    found, expected = weights(out), weights(alone.folder)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_another_run_does_not_go_on_from_a_state(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other data, settings or model are refused by name, and the state stays."""
    out = tmp_path / "out"
    changed = tmp_path / rows.name
    shutil.copy(rows, changed)
    _stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tune(str(model), [str(changed)], settings(), out, save_every=1)
    monkeypatch.undo()
    with pytest.raises(OfframpError, match="another learning_rate"):
        tune(str(model), [str(changed)], settings(learning_rate=2e-3), out)
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(OfframpError, match="another model"):
        tune(str(other), [str(changed)], settings(), out)
    changed.write_text(changed.read_text().replace("cat", "dog"))
    with pytest.raises(OfframpError, match=f"{rows.name} has changed"):
        tune(str(model), [str(changed)], settings(), out)
    assert state.find_state(out) is not None
    moments = out / "state" / "optimiser.safetensors"
    shutil.copy(out / "state" / "weights.safetensors", moments)
    shutil.copy(rows, changed)
    with pytest.raises(OfframpError, match="optimiser's state"):
        tune(str(model), [str(changed)], settings(), out)


@pytest.mark.parametrize("recipe", ["sft", "lite"])
def test_another_model_teaches_its_distribution(
    recipe: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """A shallower student comes near a tuned teacher at every depth that is taught."""
    teacher = tune(str(model), [str(rows)], settings("sft", epochs=6), tmp_path / "teacher").folder
    student = save_tiny(tmp_path / "student", layers=3, seed=1)
    exits = (2,) if recipe == "lite" else ()
    chosen = settings(recipe, exits=exits, distill=1.0, teacher=str(teacher), epochs=6)
    tuned = tune(str(student), [str(rows)], chosen, tmp_path / "taught")
    opened = load_tuned(str(teacher))
    assert tuned.card.teacher == fingerprint(opened.model)
    example = read_examples([str(rows)], opened.tokenizer, max_length=64).examples[0]
    ids, answer = torch.tensor([example.ids]), slice(example.first - 1, -1)
    wanted = opened.model(ids).logits.log_softmax(-1)
    for depth in (*exits, 3):
        before, after = (
            (wanted.exp() * (wanted - _spoken(folder, ids, depth))).sum(-1)[0, answer].mean()
            for folder in (student, tuned.folder)
        )
        assert after < before / 3, depth


def _spoken(folder: Path, ids: Tensor, depth: int) -> Tensor:
    """Return log-probabilities ``[1, T, V]`` of a model's exit, by transformers alone."""
    model = load_tuned(str(folder)).model
    states = model(ids, output_hidden_states=True).hidden_states
    last = depth == len(states) - 1  # it has passed the norm
    rows = states[depth] if last else model.model.norm(states[depth])
    return torch.as_tensor(model.lm_head(rows).log_softmax(-1))


def test_a_teacher_that_speaks_other_tokens_is_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """A head of another size, and one of the same size whose tokens mean something else."""
    wider, swapped = save_tiny(tmp_path / "wider"), save_tiny(tmp_path / "swapped")
    larger = load_tuned(str(wider)).model
    larger.resize_token_embeddings(300)
    larger.save_pretrained(wider)
    table = swapped / "tokenizer.json"
    facts = json.loads(table.read_text())
    words = facts["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    table.write_text(json.dumps(facts))
    for other in (wider, swapped):
        chosen = settings(distill=0.5, teacher=str(other), answers="self")
        with pytest.raises(UsageError, match=f"--teacher {other} speaks other tokens"):
            tune(str(model), [str(rows)], chosen, tmp_path / "out")
    assert not (tmp_path / "out" / answers.ANSWERS).exists(), "refused before anything is answered"


def test_a_run_does_not_go_on_with_another_teacher(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the same name has changed since."""
    teacher, out = save_tiny(tmp_path / "teacher", seed=1), tmp_path / "out"
    chosen = settings("sft", distill=0.5, teacher=str(teacher))
    _stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tune(str(model), [str(rows)], chosen, out, save_every=1)
    monkeypatch.undo()
    save_tiny(teacher, seed=2)
    with pytest.raises(OfframpError, match="another teacher"):
        tune(str(model), [str(rows)], chosen, out)
    save_tiny(teacher, seed=1)
    tune(str(model), [str(rows)], chosen, out)


def test_a_finished_folder_with_pictures_is_not_written_over(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """A tuned model costs hours."""
    out = tmp_path / "out"
    tune(str(model), [str(rows)], settings(), out)
    assert all(
        (out / name).read_bytes()[1:4] == b"PNG" for name in ("losses.png", "reliability.png")
    )
    with pytest.raises(OfframpError, match="holds a tuned model already"):
        tune(str(model), [str(rows)], settings(), out)


def test_a_loss_that_is_no_number_stops_the_run(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good state is kept, and its place and the step are named."""
    plain = Net.losses

    def broken(self: Net, *args: Any, **kwargs: Any) -> Losses:
        losses = plain(self, *args, **kwargs)
        calls.append(1)
        return losses if len(calls) < 8 else Losses(losses.total * float("nan"), {}, {})

    calls: list[int] = []
    monkeypatch.setattr(Net, "losses", broken)
    out = tmp_path / "out"
    with pytest.raises(OfframpError, match=r"no number in step 4 of .* kept in .*state"):
        tune(str(model), [str(rows)], settings(), out, save_every=1)
    kept = load_file(out / "state" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert json.loads((out / "state" / "state.json").read_text())["step"] == 3


def test_a_full_disk_keeps_the_state_before(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so in one sentence."""
    plain, writes = files.write_tensors, []

    def full(*args: Any) -> None:
        writes.append(1)
        if len(writes) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(*args)

    monkeypatch.setattr(state, "write_tensors", full)
    out = tmp_path / "out"
    with pytest.raises(OfframpError, match="No space left"):
        tune(str(model), [str(rows)], settings(), out, save_every=1)
    place = state.find_state(out)
    assert place is not None
    assert json.loads((place / "state.json").read_text())["step"] == 2


def _stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = gradients.add_gradients, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(loop, "add_gradients", stopping)


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """With the option to change."""
    nowhere = "no/such/model"
    for wrong, words in (
        (settings("lite", exits=()), "needs --exits"),
        (settings("light"), "unknown recipe 'light'; there are gates, heads, .*, sorted"),
        (settings("sft", readout="block"), "no --readout block"),
        (settings("heads", lora=4), "neither"),
        (settings("lite", teacher="base"), "--distill"),
        (settings("heads", readout="shared"), "needs --readout"),
    ):
        with pytest.raises(UsageError, match=words):
            tune(nowhere, ["nowhere.jsonl"], wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exits_that_do_not_exist_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(UsageError, match="6 layers"):
        tune(str(model), [str(rows)], settings(exits=(2, 6)), tmp_path / "out")


def test_layers_are_dropped_as_layerskip_says(model: Path) -> None:
    """Never the first, the last most often, and the same ones for the same step."""
    from offramp.tune.recipes.layerskip import dropped_share

    shares = [dropped_share(layer, 6) for layer in range(6)]
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(0.1)
    assert shares == sorted(shares)


def test_sampled_and_rotated_weights_have_the_mean_of_all(model: Path) -> None:
    """Over many steps each depth weighs what it does with all of them at once."""
    from offramp.tune.recipes._teach import chosen

    weights = {2: 0.2, 4: 0.3, 6: 0.5}
    for each_step, steps, bound in (("all", 1, 0), ("rotate", 4, 0), ("sample", 4000, 0.03)):
        sums = dict.fromkeys(weights, 0.0)
        for step in range(steps):
            draw = torch.Generator().manual_seed(step)
            moment = Moment(step, steps, settings(each_step=each_step), draw, draw)
            for depth, weight in chosen(weights, 6, moment).items():
                sums[depth] += weight / steps
        # Rotation gives each exit an equal turn: their sum is what is kept.
        if each_step == "rotate":
            assert sums[2] + sums[4] == pytest.approx(0.5)
        else:
            assert sums == pytest.approx(weights, abs=bound + 1e-9)


def test_own_answers_are_what_the_model_says_and_survive_a_kill(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, the rest is asked for; each answer is the one that ``generate`` gives."""
    loaded = offramp.load(str(model))
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()[:7]]
    said = loaded.generate(prompts, max_new_tokens=9)
    asked: dict[str, Any] = {
        "length": 64,
        "max_new_tokens": 9,
        "raw": False,
        "batch_size": 2,
        "show": False,
    }
    plain, tokens = decode, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for token in plain(*args, **kwargs):
            tokens.append(token)
            if len(tokens) == 30:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr("offramp.tune.answers.decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers.answer(loaded, prompts, tmp_path, {"rows": "ab"}, **asked)
    kept = (tmp_path / "answers.jsonl").read_text()
    assert 1 < len(kept.splitlines()) < 8
    (tmp_path / "answers.jsonl").write_text(kept + '{"prompt": 6, "id')  # cut by the kill
    monkeypatch.undo()
    data = answers.answer(loaded, prompts, tmp_path, {"rows": "ab"}, **asked)
    assert [e.ids[e.first :] for e in data.examples] == [o.token_ids for o in said.outputs]
    again = answers.answer(loaded, prompts, tmp_path, {"rows": "ab"}, **asked)
    assert again == data
    with pytest.raises(OfframpError, match="another max_new_tokens"):
        answers.answer(loaded, prompts, tmp_path, {}, **(asked | {"max_new_tokens": 8}))


@pytest.mark.parametrize("lora_layers", [0, 4])
def test_adapters_come_out_small_and_open_as_what_was_trained(
    lora_layers: int, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Only the first layers get some if told so; the opened folder speaks at its exits."""
    chosen = settings(lora=4, lora_layers=lora_layers, learning_rate=1e-2, epochs=6)
    tuned = tune(str(model), [str(rows)], chosen, tmp_path / "out")
    found = weights(tuned.folder)
    assert all("lora_" in name for name in found)
    touched = {int(name.split("layers.")[1].split(".")[0]) for name in found}
    assert touched == set(range(lora_layers or 6))
    assert all(
        new["loss"] < old["loss"]
        for old, new in zip(tuned.before["held out"], tuned.after["held out"], strict=True)
    )
    opened = load_tuned(str(tuned.folder))
    read = read_examples([str(rows)], opened.tokenizer, max_length=64).examples
    found_again = judge(Net(opened.model, (2, 4)), hold_out(read, chosen)[1], 64, "cpu")
    for again, reported in zip(found_again, tuned.after["held out"], strict=True):
        assert again["loss"] == pytest.approx(reported["loss"], rel=1e-4)


@pytest.mark.parametrize("lora", [0, 4])
def test_readouts_may_be_trained_along_with_the_model(
    lora: int, model: Path, rows: Path, tmp_path: Path
) -> None:
    """The folder then holds both, and opens with both."""
    chosen = settings(readout="block", lora=lora, learning_rate=3e-3, epochs=3)
    tuned = tune(str(model), [str(rows)], chosen, tmp_path / "out")
    assert all(
        new["loss"] < old["loss"]
        for old, new in zip(tuned.before["held out"], tuned.after["held out"], strict=True)
    )
    opened = offramp.load(str(tuned.folder))
    assert dict(opened.backbone.blocks) == {2: 6, 4: 7}


@pytest.mark.parametrize("kind", ["affine", "head", "block"])
def test_readouts_open_as_what_was_trained(
    kind: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """An exit of the opened folder agrees with the last layer as often as the report says."""
    chosen = settings("heads", readout=kind, learning_rate=1e-2, epochs=4, held_out=10, raw=True)
    tuned = tune(str(model), [str(rows)], chosen, tmp_path / "out")
    plain, opened = offramp.load(str(model)), offramp.load(str(tuned.folder))
    prompts = ["say cat:", "say mat:"]
    assert plain.generate(prompts).outputs == opened.generate(prompts).outputs
    draft = offramp.Plan(run=offramp.Speculate(draft=(0, 1, 2, 3)))
    drafted = opened.generate(prompts, plan=draft)
    assert [o.token_ids for o in drafted.outputs] == [
        o.token_ids for o in plain.generate(prompts).outputs
    ]
    assert drafted.figures.work != plain.generate(prompts).figures.work


@pytest.mark.parametrize("answers", [None, "self"])
def test_the_card_knows_every_prompt(
    answers: str | None, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Who wrote the answers does not matter, nor do repeats; a document is known as a whole."""
    documents = tmp_path / "documents.txt"
    documents.write_text("Once upon a time.\n\nThere was\na cat.\n")
    data = [str(rows)] if answers else [str(rows), str(documents)]
    chosen = settings("gates", tokens=64, answers=answers, answer_tokens=4)
    card = tune(str(model), data, chosen, tmp_path / "out").card
    known = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    known += [] if answers else ["Once upon a time.", "There was a cat."]
    assert card.data is not None
    assert card.data.prompts == sketched(keys(known))
    assert 2 < len(set(known)) < 50
    assert offramp.load(str(tmp_path / "out")).card == card


def test_gates_learn_when_the_exit_is_right(model: Path, rows: Path, tmp_path: Path) -> None:
    """Their loss falls below that of not looking, and the file is a check of its model."""
    chosen = settings("gates", learning_rate=0.05, epochs=10)
    tuned = tune(str(model), [str(rows)], chosen, tmp_path / "out")
    lines = [json.loads(line) for line in (tuned.folder / "log.jsonl").read_text().splitlines()]
    first, last = lines[0]["losses"], lines[-1]["losses"]
    assert first == pytest.approx({"2": 0.6931, "4": 0.6931}, abs=1e-3)
    assert all(last[depth] < 0.8 * first[depth] for depth in first)
    opened = offramp.load(str(tuned.folder))
    check = offramp.GateFile(file=str(tuned.folder / "gates.safetensors"))
    run = offramp.Exit(signal="gate", thresholds={2: 0.0, 4: 0.0}, check=check)
    found = opened.generate("say cat:", plan=offramp.Plan(run=run), max_new_tokens=6)
    assert set(found.outputs[0].depths[1:]) == {2}


@pytest.mark.parametrize("gate_input", ["hidden", "fixed"])
def test_skip_gates_run_fewer_layers_the_more_they_cost(
    gate_input: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """The executed share falls with its price; it never falls below the two fixed layers."""
    shares = []
    for alpha in (0.0, 20.0):
        chosen = settings("skip", alpha=alpha, gate_input=gate_input, epochs=8)
        out = tmp_path / str(alpha)
        tune(str(model), [str(rows)], chosen, out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        tail = [line["losses"]["0"] for line in lines[-10:]]
        shares.append(sum(tail) / len(tail))
    assert 2 / 6 <= shares[1] < shares[0] - 0.1


def test_a_tracker_is_told_what_the_log_is(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step once, with the loss of each depth; one that is not installed is refused at once."""
    told: dict[int, dict[str, float]] = {}

    def keep(_self: Accelerator, values: dict[str, float], step: int) -> None:
        told[step] = values

    monkeypatch.setattr(Accelerator, "log", keep)
    out = tmp_path / "out"
    tune(str(model), [str(rows)], settings(), out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert list(told) == [line["step"] for line in lines]
    for line in lines:
        values = told[line["step"]]
        assert {f"loss/{depth}": loss for depth, loss in line["losses"].items()}.items() <= (
            values.items()
        )
    monkeypatch.setattr(loop, "find_spec", lambda _name: None)
    with pytest.raises(OfframpError, match="pip install trackio"):
        tune(str(model), [str(rows)], settings(), tmp_path / "other", tracker="trackio")
    assert not (tmp_path / "other").exists()


def test_skip_gates_beside_adapters_are_not_lost(model: Path, rows: Path, tmp_path: Path) -> None:
    """The folder holds both, and opens."""
    tuned = tune(str(model), [str(rows)], settings("skip", lora=4), tmp_path / "out")
    gates = load_file(tuned.folder / "gates.safetensors")
    assert {name.partition(".")[0] for name in gates} == {"1", "2", "3", "4"}
    assert (tuned.folder / "adapter_model.safetensors").is_file()
    opened = offramp.load(str(tuned.folder))
    assert opened.card == tuned.card
    plan = offramp.Plan(run=offramp.Skip(gates=str(tuned.folder / "gates.safetensors")))
    assert opened.generate("say cat:", plan=plan, max_new_tokens=4).figures.tokens
    with pytest.raises(UsageError, match="were trained with a model of 6 layers"):
        offramp.load(str(model)).generate("say cat:", plan=plan)
