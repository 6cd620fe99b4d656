"""A run's folder, identity and beginning: what is refused, what is the same again after a kill."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from filelock import FileLock
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from offramp.card import READOUTS
from offramp.errors import OfframpError, UsageError
from offramp.readouts import ExitReadout, read_readouts, write_readouts
from offramp.tune import gradients, loop, run, state
from offramp.tune.answers import ANSWERS
from offramp.tune.data import NO_TOKENS, Example, read_examples
from offramp.tune.gradients import arithmetic
from offramp.tune.log import read_log
from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import collate
from offramp.tune.place import held
from offramp.tune.run import tune
from offramp.tune.settings import Settings, make_settings
from tests.conftest import byte_tokenizer, save_tiny
from tests.families import build
from tests.test_tune_loop import settings, weights


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    for name in ("draw", "draw_reliability"):
        monkeypatch.setattr(run, name, lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of ten rows: a run of three steps."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"prompt": f"say {word}:", "completion": f" {word} {word}"} for word in "abcdefghij"]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def short(recipe: str = "lite", **changes: Any) -> Settings:
    """Return the settings of a run of three steps."""
    return settings(recipe, **{"held_out": 2, "rows": 1, "rows_at_once": 1, **changes})


def stop_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run in this step, counted from 1."""
    plain, calls = gradients.add_gradients, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(loop, "add_gradients", stopping)


def interrupted(model: Path, rows: Path, out: Path, step: int, chosen: Settings) -> None:
    """Leave a run that was interrupted in this step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in(step, patch)
        with pytest.raises(KeyboardInterrupt):
            tune(str(model), [str(rows)], chosen, out, save_every=1)


def test_only_a_new_folder_or_that_of_a_run_is_written_to(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """Never a model's, whose weights would be lost, nor a file, nor what another run writes to."""
    file = tmp_path / "file"
    file.write_text("mine")
    kept = (model / "model.safetensors").read_bytes()
    for taken, words in ((model, "something else"), (file, "no folder"), (tmp_path, "something")):
        with pytest.raises(UsageError, match=words):
            tune(str(model), [str(rows)], short(), taken)
    assert (model / "model.safetensors").read_bytes() == kept
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(OfframpError, match="another run is writing"):
        tune(str(model), [str(rows)], short(), out)
    with pytest.raises(OfframpError, match="cannot write to"):
        tune(str(model), [str(rows)], short(), Path("/proc/nowhere/out"))


def test_what_fails_before_it_begins_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    """A name that was tried in vain is free for the next try."""
    with pytest.raises(OfframpError, match="no file"):
        tune(str(model), [str(tmp_path / "nowhere.jsonl")], short(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with held(tmp_path / "out", main=True):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_a_kill_between_two_renames_leaves_a_whole_state(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kill before left the older state alone, under its other name."""
    place, old, new = tmp_path / "state", tmp_path / ".state.old", tmp_path / ".state.part"
    real: dict[str, Any] = {"rename": Path.rename, "rmtree": shutil.rmtree}
    for moment in range(4):
        for folder in (place, old, new):
            real["rmtree"](folder, ignore_errors=True)
        for folder in (place if whole else old, new):
            folder.mkdir()
            (folder / "state.json").write_text("{}")
        calls: list[int] = []

        def killed(name: str, calls: list[int] = calls, moment: int = moment) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) > moment:
                    raise KeyboardInterrupt
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed("rename"))
            patch.setattr(shutil, "rmtree", killed("rmtree"))
            with suppress(KeyboardInterrupt):
                state._swap(new, place)
        assert state.find_state(tmp_path) is not None, f"killed in call {moment + 1}"


def test_other_rows_of_the_same_file_are_another_run(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """The file's fingerprint does not tell them: --limit and --skip-bad choose among its rows."""
    out = tmp_path / "out"
    interrupted(model, rows, out, 2, short())
    with pytest.raises(OfframpError, match="other rows of the same data"):
        tune(str(model), [str(rows)], short(), out, limit=9)
    tune(str(model), [str(rows)], short(), out, save_every=7, watch=[str(rows)])


def test_figures_kept_from_before_are_those_of_this_run(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """Interrupted before its first state, a folder may be used with other exits and texts."""
    out = tmp_path / "out"
    interrupted(model, rows, out, 1, short())
    tuned = tune(str(model), [str(rows)], short(exits=(3,)), out, watch=[str(rows), str(rows)])
    assert [*tuned.before] == [*tuned.after] == ["held out", rows.name, f"{rows.name} (2)"]
    assert all([row["depth"] for row in made] == [3, 6] for made in tuned.before.values())
    assert sorted(p.name for p in out.iterdir() if p.name.startswith((".", "before"))) == []


def test_a_model_with_dropout_goes_on_bit_for_bit(rows: Path, tmp_path: Path) -> None:
    """Dropout would draw from a generator that no state holds; it stays off."""
    folder = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128, "vocab_size": 257}
    plain = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=256, eos_token_id=256))
    assert plain.config.resid_pdrop > 0
    plain.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    unbroken = tune(str(folder), [str(rows)], short(), tmp_path / "unbroken")
    out = tmp_path / "out"
    interrupted(folder, rows, out, 3, short())
    tune(str(folder), [str(rows)], short(), out)
    assert _same(weights(out), weights(unbroken.folder))


@pytest.mark.parametrize("changes", [{"lora": 2}, {"recipe": "skip"}])
def test_what_is_added_begins_as_the_seed_says(
    changes: dict[str, Any], model: Path, rows: Path, tmp_path: Path
) -> None:
    """Whatever the process drew before; another seed draws other adapters and gates."""
    made = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        out = tmp_path / str(number)
        tune(str(model), [str(rows)], short(**changes, seed=seed), out)
        made.append(weights(out))
    assert _same(made[0], made[1])
    assert not _same(made[0], made[2])


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_gradient_that_is_no_number_stops_the_run(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it reaches a state, although the loss is a number."""
    plain = Net.losses

    def overflowing(self: Net, *args: Any, **kwargs: Any) -> Losses:
        losses = plain(self, *args, **kwargs)
        calls.append(1)
        if len(calls) > 1:
            losses.total.register_hook(lambda slope: slope * float("inf"))
        return losses

    calls: list[int] = []
    monkeypatch.setattr(Net, "losses", overflowing)
    out = tmp_path / "out"
    with pytest.raises(OfframpError, match=r"no number in step 2 of .* kept in .*state"):
        tune(str(model), [str(rows)], short(), out, save_every=1)
    assert json.loads((out / "state" / "state.json").read_text())["step"] == 1


def test_one_process_tunes_in_one_precision_after_the_other(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """In bf16 losses are near those in fp32, and not the same."""
    for precision in ("fp32", "bf16"):
        tune(str(model), [str(rows)], short(precision=precision), tmp_path / precision)
    exact, rounded = (read_log(tmp_path / name)[0]["losses"] for name in ("fp32", "bf16"))
    assert exact == pytest.approx(rounded, rel=0.02)
    assert exact != rounded


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_left_to_processors_that_have_it(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated, its products take many times as long as those of fp32."""
    monkeypatch.setattr("offramp.tune.gradients.multiplies_bf16", lambda: has)
    with arithmetic(short(precision="auto"), torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == has


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_in_bf16_are_near_those_in_fp32(family: str) -> None:
    """Of head and layers alike, with a teacher, whose pass keeps no graph, before the student's."""
    model = build(family).eval()
    net = Net(model, (2, 4))
    draw = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    batch = collate([[0]], [Example(torch.randint(size, (24,), generator=draw).tolist(), 1)])
    weights = dict.fromkeys((2, 4, net.num_layers), 1.0)
    found = []
    for precision in ("fp32", "bf16"):
        model.zero_grad()
        with arithmetic(short(precision=precision), torch.device("cpu")):
            states = net.states(batch, [*weights])
            total = net.losses(states, weights, {2: 1.0, 4: 1.0}).total
        total.backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    exact, rounded = found
    assert exact.keys() == rounded.keys()
    for name, gradient in exact.items():
        if gradient.norm() > 1e-3:
            apart = (rounded[name] - gradient).norm() / gradient.norm()
            assert apart < 0.2, name


def test_a_teacher_goes_where_the_net_goes() -> None:
    """It is no part of the module, and yet has to be on its device."""
    net = Net(build("llama"), (2,), teacher=build("llama"))
    net.to("meta")
    assert {p.device.type for p in net._teacher[0].parameters()} == {"meta"}


def test_models_in_shards_are_refused_and_resting_parameters_foreseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recipes whose steps leave some exits out say so to DDP."""
    asked: list[Any] = []
    kind = DistributedType.NO

    def made(*, kwargs_handlers: list[Any], **_: Any) -> Any:
        asked.append(kwargs_handlers[0].find_unused_parameters)
        return SimpleNamespace(distributed_type=kind)

    monkeypatch.setattr(loop, "Accelerator", made)
    for chosen in (short(), short("layerskip"), short(each_step="rotate")):
        loop.make_accelerator(chosen)
    assert asked == [False, True, True]
    kind = DistributedType.FSDP
    with pytest.raises(OfframpError, match="not with FSDP"):
        loop.make_accelerator(short())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exits": (0, 2)}, "--exits: 0 "),
        ({"exits": (4, 2)}, "ascend"),
        ({"exits": (2, 2)}, "ascend"),
        ({"learning_rate": 0.0}, "--learning-rate: 0"),
        ({"learning_rate": 5.0}, "--learning-rate: 5"),
        ({"length": 2**21}, "--length"),
        ({"lora_layers": 2}, "--lora"),
        ({"recipe": "sft", "distill": 0.5}, "--teacher base"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_options_name(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Before anything is loaded."""
    given = {**short().model_dump(), **changes}
    with pytest.raises(UsageError, match=words):
        tune("no/such/model", ["nowhere.jsonl"], make_settings(**given), tmp_path / "out")


def test_layers_for_adapters_that_do_not_exist_are_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """By number."""
    with pytest.raises(UsageError, match="6 layers"):
        tune(str(model), [str(rows)], short(lora=2, lora_layers=7), tmp_path / "out")


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({"lora": 2}, {}, "an adapter"),
        ({"recipe": "heads", "readout": "affine"}, {}, "affine at 2, affine at 4"),
        ({"recipe": "heads", "readout": "affine"}, {"readout": "block"}, "none of which goes on"),
        ({"recipe": "gates"}, {}, "gates"),
    ],
)
def test_what_lies_over_another_model_is_not_left_behind(
    first: dict[str, Any],
    then: dict[str, Any],
    words: str,
    model: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    """An adapter is refused, and so are readouts where none goes on."""
    made = tune(str(model), [str(rows)], short(**first), tmp_path / "first")
    with pytest.raises(UsageError, match=words):
        tune(str(made.folder), [str(rows)], short(**then), tmp_path / "second")


@pytest.mark.parametrize("recipe", ["heads", "lite"])
@pytest.mark.parametrize("kind", ["affine", "head", "block"])
def test_readouts_are_tuned_further_alone_or_with_the_model(
    kind: str, recipe: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Where the first run ended, the second begins; what comes out names the model below."""
    own = {"recipe": "heads", "readout": kind}
    first = tune(str(model), [str(rows)], short(**own), tmp_path / "first")
    then = short(recipe=recipe, readout=kind)
    second = tune(str(first.folder), [str(rows)], then, tmp_path / "second")
    assert second.before == first.after
    assert second.after != first.after
    assert second.card.base == first.card.base
    third = tune(str(second.folder), [str(rows)], then, tmp_path / "third")
    assert third.before == second.after


def test_readouts_of_another_model_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    """In one sentence, though their kind and depths are right."""
    own: dict[str, Any] = {"recipe": "heads", "readout": "affine"}
    first = tune(str(model), [str(rows)], short(**own), tmp_path / "first").folder
    wrong = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
    spoilt = {depth: ExitReadout("affine", wrong) for depth in read_readouts(first / READOUTS)}
    write_readouts(first / READOUTS, spoilt)
    with pytest.raises(OfframpError, match="affine of exit 2"):
        tune(str(first), [str(rows)], short(**own), tmp_path / "second")


def test_readouts_learn_from_the_answers_of_the_model_below(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """Its own answers are those, and another run's are taken as they are."""
    own: dict[str, Any] = {"readout": "affine", "answers": "self", "answer_tokens": 6}
    first = tune(str(model), [str(rows)], short(recipe="heads", **own), tmp_path / "first").folder
    out = tmp_path / "second"
    out.mkdir()
    shutil.copy(first / ANSWERS, out / ANSWERS)
    kept = (first / ANSWERS).read_bytes()
    tune(str(first), [str(rows)], short(**own), out)
    assert (out / ANSWERS).read_bytes() == kept


def test_a_run_over_other_readouts_is_another_run(model: Path, rows: Path, tmp_path: Path) -> None:
    """Its state is refused, though the model below is the same."""
    own: dict[str, Any] = {"recipe": "heads", "readout": "affine"}
    started = [
        tune(str(model), [str(rows)], short(**own, seed=seed), tmp_path / str(seed)).folder
        for seed in (1, 2)
    ]
    out = tmp_path / "out"
    interrupted(started[0], rows, out, 2, short(**own))
    with pytest.raises(OfframpError, match="another model"):
        tune(str(started[1]), [str(rows)], short(**own), out)


def test_a_whole_tuned_model_is_tuned_further(model: Path, rows: Path, tmp_path: Path) -> None:
    """Where the first run ended, the second begins."""
    first = tune(str(model), [str(rows)], short(), tmp_path / "first")
    second = tune(str(first.folder), [str(rows)], short(), tmp_path / "second")
    assert second.before == first.after


def test_a_model_that_learnt_prompts_as_they_are_is_not_asked_in_another_way(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """With the option to give; asked as before, it is tuned further."""
    first = tune(str(model), [str(rows)], short(raw=True), tmp_path / "first")
    with pytest.raises(UsageError, match="--raw"):
        tune(str(first.folder), [str(rows)], short(), tmp_path / "second")
    tune(str(first.folder), [str(rows)], short(raw=True), tmp_path / "second")


def test_answers_that_could_not_be_used_are_not_asked_for(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take hours."""
    monkeypatch.setattr("offramp.tune.answers.decode", lambda *_, **__: pytest.fail("asked"))
    text = tmp_path / "text.txt"
    text.write_text("A document asks nothing.\n")
    for source, changes, words in (
        (rows, {"held_out": 10}, "hold out fewer"),
        (rows, {"exits": (2, 6)}, "6 layers"),
        (text, {}, "asks nothing"),
    ):
        chosen = short(answers="self", answer_weights="fp32", **changes)
        with pytest.raises(OfframpError, match=words):
            tune(str(model), [str(source)], chosen, tmp_path / "out")


def test_a_log_that_is_not_ours_is_not_gone_on_with(tmp_path: Path) -> None:
    """Whatever lies there under its name."""
    for content in (b"[1]\n", b'{"a": 1}\n', b"\xff\xfe", b"nonsense"):
        (tmp_path / "log.jsonl").write_bytes(content)
        assert read_log(tmp_path) == []


def test_an_answer_without_tokens_is_left_out_and_counted(tmp_path: Path) -> None:
    """A tokenizer may know no letter of it, and have no end: there is nothing to learn."""
    rows = tmp_path / "rows.jsonl"
    made = [{"prompt": "a", "completion": answer} for answer in ("b", "c")]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    tokenizer = byte_tokenizer(template=False)
    tokenizer.eos_token = None

    class Deaf:
        """Hears no c."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer([text.replace("c", "") for text in texts], **options)

    data = read_examples([str(rows)], Deaf(), raw=True)
    assert (len(data.examples), data.skipped) == (1, {NO_TOKENS: 1})
