"""The harness's model: both halves are the plan's, and full depth is the harness's own model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

import offramp
from offramp import Exit, GateFile, OfframpError, Plan, Skip, Speculate, Tokens, UsageError
from offramp.checks import Refined, Shortlist
from offramp.cli import lm_eval as command
from offramp.evaluate import items as evaluate
from offramp.evaluate.kept import Group
from offramp.evaluate.run import Settings, compare
from offramp.evaluate.tasks import Kind, Task
from offramp.gate import fit_gate
from offramp.harness.lm import OfframpLM
from offramp.harness.score import Item, Score, _run, method, score
from offramp.plan import write_plan
from offramp.runs import Full, Run
from offramp.runs import Path as SubModel
from offramp.trace import record
from tests.test_skipping import gates as skip_gates
from tests.tools import AnyBackbone

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

PAIRS = [
    ("Once there was a", " cat that sat"),
    ("Once there was a", " dog"),
    ("", "nothing before it"),
    ("It ends in a space ", "and goes on"),
    ("short", "!"),
]
TEXTS = ["a text of its own", "x" * 70, "one more, which is a little longer than the window"]
EXITS = {2: 0.1, 4: 0.1}


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def exit_run(**changes: Any) -> Exit:
    return Exit(signal="max_prob", thresholds=EXITS, **changes)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    """The harness's own backend on the same checkpoint."""
    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> OfframpLM:
    return OfframpLM(pretrained=str(checkpoint), backbone="hf", batch_size=3)


def items(model: offramp.Model, count: int = 4) -> list[Item]:
    generator = torch.Generator().manual_seed(3)
    lengths = [(9, 12), (1, 7), (5, 1), (20, 5)][:count]
    ids = [torch.randint(4, 250, (a + b,), generator=generator).tolist() for a, b in lengths]
    return [Item(one[:a], one[a:]) for one, (a, _) in zip(ids, lengths, strict=True)]


def scored(model: offramp.Model, run: Run, what: list[Item], **options: Any) -> list[Score]:
    found = dict(score(model.backbone, run, what, eos=model.eos, **options))
    return [found[i] for i in range(len(what))]


def same(a: Score, b: Score) -> bool:
    return (
        abs(a.logprob - b.logprob) <= 1e-4 * max(1, abs(b.logprob))
        and a.greedy == b.greedy
        and a.depths == b.depths
    )


def test_full_depth_scores_as_the_harness_does(ours: OfframpLM, theirs: HFLM) -> None:
    """The same numbers to 1e-4, however texts are batched; also of a text before nothing."""
    requests = asked("loglikelihood", *PAIRS)
    for (a, greedy), (b, also) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert abs(a - b) < 1e-4 * max(1, abs(b))
        assert greedy == also


def test_full_depth_rolls_as_the_harness_does(checkpoint: Path) -> None:
    """Over several windows of a text that is longer than one."""
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", max_length=24)
    ours = OfframpLM(pretrained=str(checkpoint), backbone="hf", max_length=24)
    requests = asked("loglikelihood_rolling", *[(text,) for text in TEXTS])
    found = ours.loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-4)


def test_a_long_context_is_cut_as_the_harness_cuts_it(checkpoint: Path) -> None:
    """From the left, in both halves."""
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", max_length=24)
    ours = OfframpLM(pretrained=str(checkpoint), backbone="hf", max_length=24)
    requests = asked("loglikelihood", (TEXTS[2], " and so on"))
    assert ours.loglikelihood(requests)[0][0] == pytest.approx(
        theirs.loglikelihood(requests)[0][0], rel=1e-4
    )


def test_full_depth_writes_as_the_harness_does(ours: OfframpLM, theirs: HFLM) -> None:
    """The same greedy text, ended by the same strings, as long as was asked for."""
    [text] = theirs.generate_until(
        asked("generate_until", (TEXTS[0], {"until": [], "max_gen_toks": 16}))
    )
    assert len(set(text)) > 5
    stop = next(c for c in text[4:] if c.isascii())
    options = {"until": [stop, "never"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", *[(text, options) for text in TEXTS[::2]])
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def logprobs(theirs: HFLM, given: list[list[int]], said: list[list[int]]) -> list[Any]:
    """What the harness's own model thinks of tokens: (log-probability, whether greedy) each."""
    pairs = zip(given, said, strict=True)
    return list(theirs._loglikelihood_tokens([(("", ""), a, b) for a, b in pairs], True))


def first_of(theirs: HFLM, prompt: str, text: str) -> list[int]:
    """The first token of a text behind a prompt."""
    return list(theirs.tok_encode(prompt + text)[len(theirs.tok_encode(prompt)) :][:1])


def agrees_with_evaluate(
    model: offramp.Model, theirs: HFLM, prompts: list[str], folder: Path, count: int
) -> None:
    """Assert that `evaluate`'s full depth is the harness's own model: text, loss and accuracy."""
    options = {"until": [], "max_gen_toks": count, "do_sample": False}
    written = theirs.generate_until(asked("generate_until", *[(one, options) for one in prompts]))
    firsts = [first_of(theirs, *pair) for pair in zip(prompts, written, strict=True)]
    rights = [model.tokenizer.decode(one) if k % 2 else "~" for k, one in enumerate(firsts)]
    items = [evaluate.Item(*pair) for pair in zip(prompts, [(r,) for r in rights], strict=True)]
    kinds: dict[Kind, str] = {"choice": "accuracy", "answer": "rouge_l", "reading": ""}
    tasks = [
        (Task(kind, kind, lambda _paths, _draw: items, (score,) if score else ()), items)
        for kind, score in kinds.items()
    ]
    plan = Plan(run=SubModel(layers=tuple(range(model.backbone.shape.num_layers - 1))))
    settings = Settings(max_new_tokens=count, batch_size=2, raw=True)
    choice, _, reading = compare(model, plan, tasks, settings, kept=folder / "kept", show=False)
    groups = map(Group.model_validate_json, (folder / "kept").read_text().splitlines()[1:])
    answered = [group for group in groups if group.task == "answer"]
    full = [one for group in answered for one in group.full.answers]
    plans = [one for group in answered for one in group.plan.answers]
    assert [one.text for one in full] == written
    ids = [theirs.tok_encode(prompt) for prompt in prompts]
    for answers, greedy in ((full, True), (plans, False)):  # both judged by the full model
        found = logprobs(theirs, ids, [list(one.ids) for one in answers])
        own = [-(one.loss or 0.0) * len(one.ids) for one in answers]
        assert own == pytest.approx([logprob for logprob, _ in found], rel=1e-4, abs=1e-3)
        assert all(said for _, said in found) == greedy
    golds = [first_of(theirs, *pair) for pair in zip(prompts, rights, strict=True)]
    right = [said for _, said in logprobs(theirs, ids, golds)]
    assert 0 < sum(right) < len(right)
    assert choice.rows[0].full.mean == pytest.approx(sum(right) / len(right))
    read = logprobs(theirs, [one[:1] for one in ids], [one[1:] for one in ids])
    loss = -sum(logprob for logprob, _ in read) / sum(len(one) - 1 for one in ids)
    assert reading.rows[0].full.mean == pytest.approx(loss, rel=1e-4)


def test_evaluates_full_depth_is_the_harnesses_own_model(
    tiny: offramp.Model, theirs: HFLM, tmp_path: Path
) -> None:
    """The same items: generated text, log-likelihood of answers and passages, first tokens."""
    prompts = ["Once there was", "ab", "and then it went", "hills, and rain", "x y", "No. 5"]
    agrees_with_evaluate(tiny, theirs, prompts, tmp_path, 7)


def test_each_request_has_its_own_options(ours: OfframpLM) -> None:
    """Different lengths and stops in one call."""
    short, long = ours.generate_until(
        asked(
            "generate_until",
            (TEXTS[0], {"until": [], "max_gen_toks": 3}),
            (TEXTS[0], {"until": [], "max_gen_toks": 12}),
        )
    )
    assert long.startswith(short)
    assert len(short) < len(long)


@torch.no_grad()
def by_hand(backbone: AnyBackbone, run: Exit, item: Item) -> tuple[float, bool, list[int]]:
    """What an exit plan says, from the untouched model's own hidden states alone."""
    ids = torch.tensor([[*item.given, *item.said]])
    model: Any = backbone.model
    hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    full = model(input_ids=ids, use_cache=False).logits[0]
    total, greedy, depths, waiting = 0.0, True, [], 0
    for t, token in enumerate(item.said):
        place = len(item.given) - 1 + t
        logits: Tensor = full[place]
        depth = backbone.shape.num_layers
        may = (t > 0 or run.exit_prompt) and waiting < run.max_waiting
        for stop, bar in sorted(run.thresholds.items(), reverse=True):
            early = model.lm_head(model.model.norm(hidden[stop][0, place]))
            if may and early.softmax(-1).max() >= bar:
                logits, depth = early, stop
        left = depth < backbone.shape.num_layers
        waiting = (waiting + (len(item.given) if t == 0 else 1)) if left else 0
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        depths.append(depth)
    return total, greedy, depths


@pytest.mark.parametrize(
    "changes", [{}, {"max_waiting": 2}, {"exit_prompt": True, "max_waiting": 40}]
)
def test_an_exit_plan_scores_each_token_where_it_leaves(
    tiny: offramp.Model, changes: dict[str, Any]
) -> None:
    """By hand, token by token; and it is not the full model that is scored."""
    run, what = exit_run(**changes), items(tiny)
    found = scored(tiny, run, what)
    for one, item in zip(found, what, strict=True):
        assert same(one, Score(*by_hand(tiny.backbone, run, item)))  # type: ignore[arg-type]
    depths = {depth for one in found for depth in one.depths}
    assert depths == {2, 4, 6}
    full = scored(tiny, Full(), what)
    assert abs(found[0].logprob - full[0].logprob) > 0.1


@pytest.mark.parametrize("changes", [{}, {"max_waiting": 2}, {"exit_prompt": True}])
def test_a_replay_is_the_loop_told_what_to_say(
    tiny: offramp.Model, changes: dict[str, Any]
) -> None:
    """Law 4, through the harness's two ways to score."""
    run, what = exit_run(**changes), items(tiny)
    told = dict(_run(tiny.backbone, run, what, tiny.eos, batch_size=2))
    for i, one in enumerate(scored(tiny, run, what)):
        assert same(one, told[i])


def test_a_plan_that_never_leaves_is_full_depth(tiny: offramp.Model) -> None:
    what = items(tiny)
    never = Exit(signal="max_prob", thresholds=dict.fromkeys(EXITS, 1.0))
    for run in (never, never.model_copy(update={"kv": "copy"}), SubModel(layers=tuple(range(6)))):
        for a, b in zip(scored(tiny, run, what), scored(tiny, Full(), what), strict=True):
            assert same(a, b)


RUNS: list[Run] = [
    Full(),
    Speculate(draft=(0, 1, 2)),
    SubModel(layers=(0, 1, 4)),
    exit_run(),
    exit_run(max_waiting=2),
    exit_run(check=Shortlist(size=40)),
    exit_run(kv="copy"),
    exit_run(head=Tokens(tokens=tuple(range(40, 120)))),
    SubModel(layers=(0, 1, 4), head=Tokens(tokens=tuple(range(40, 120)))),
]


def agrees_with_itself(lm: OfframpLM, run: Run) -> None:
    """Assert that a plan's own answer is its first choice, at the depths it was written.

    The full model, for its part, would have said something else where the plan is lossy.
    """
    prompts = ["Once there was", "a", "and then it went"]
    written = lm.model.generate(prompts, plan=Plan(run=run), max_new_tokens=20, raw=True).outputs
    what = [
        Item(lm.tok_encode(prompt), one.token_ids)
        for prompt, one in zip(prompts, written, strict=True)
    ]
    found = scored(lm.model, run, what, batch_size=2)
    assert all(one.greedy for one in found)
    if not isinstance(run, Speculate):  # its tokens are confirmed by every layer
        assert [one.depths for one in found] == [one.depths for one in written]
    lossless = Plan(run=run).lossless
    assert all(one.greedy for one in scored(lm.model, Full(), what)) == lossless


@pytest.mark.parametrize("run", RUNS, ids=range(len(RUNS)))
def test_what_a_plan_writes_is_what_it_scores_as_greedy(ours: OfframpLM, run: Run) -> None:
    """Both halves are one plan."""
    agrees_with_itself(ours, run)


def test_so_it_is_with_learnt_gates(ours: OfframpLM, tmp_path: Path) -> None:
    """Of exits, which judge states that a replay has to keep, and of single layers."""
    backbone = ours.model.backbone
    trace = record(
        backbone, [(one.given + one.said, 1) for one in items(ours.model)], (2, 4), keep_hidden=True
    )
    assert trace.hidden is not None
    fitted = fit_gate(trace)
    fitted.save(tmp_path / "exits")
    middle = {
        depth: fitted.score(trace.hidden[:, column], depth).median().item()
        for column, depth in enumerate((2, 4))
    }
    by_state = Exit(signal="gate", thresholds=middle, check=GateFile(file=str(tmp_path / "exits")))
    skip_gates(of=backbone).save(tmp_path / "skips")
    skips = Skip(gates=str(tmp_path / "skips"))
    assert (method(by_state), method(skips)) == ("replay", "loop")
    for run in (by_state, skips):
        agrees_with_itself(ours, run)


def test_what_a_head_cannot_say_is_refused(tiny: offramp.Model) -> None:
    """A probability of nothing is no score."""
    run = SubModel(layers=(0, 1), head=Tokens(tokens=(70, 80)))
    for token in (75, 200):  # between them, and behind the last
        with pytest.raises(UsageError, match=f"can never say token {token}"):
            scored(tiny, run, [Item([5, 6], [70, token])])
    with pytest.raises(UsageError, match="would have stopped"):
        scored(tiny, exit_run(kv="copy"), [Item([5, 6], [256, 7])])


def test_scores_do_not_depend_on_company(tiny: offramp.Model) -> None:
    """Batches of any size, and where logits are so many that a batch is cut."""
    what = items(tiny)
    for run in (Full(), exit_run(kv="copy")):
        alone = [scored(tiny, run, [one])[0] for one in what]
        for size in (1, 3, 8):
            found = scored(tiny, run, what, batch_size=size)
            assert all(same(a, b) for a, b in zip(found, alone, strict=True))


def test_a_large_vocabulary_cuts_batches(
    tiny: offramp.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = items(tiny)
    whole = scored(tiny, Full(), what)
    monkeypatch.setattr("offramp.harness.score._BUDGET", 257 * 12)
    assert all(same(a, b) for a, b in zip(scored(tiny, Full(), what), whole, strict=True))


def test_a_refined_head_scores_as_the_full_one() -> None:
    """Of its logits only the largest is exact, and a score is of all."""
    layers = (0, 2)
    assert method(SubModel(layers=layers, head=Refined())) == "pass"
    assert method(exit_run().model_copy(update={"head": Refined()})) == "replay"
    assert method(exit_run(kv="copy").model_copy(update={"head": Refined()})) == "loop"


def test_how_a_plan_is_scored_is_said() -> None:
    assert [method(run) for run in RUNS] == ["pass"] * 3 + ["replay"] * 3 + ["loop"] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 4}, "no generation option num_beams"),
        ({"penalty_alpha": 0.6, "typical_p": 0.9}, "option penalty_alpha, typical_p"),
        ({"max_gen_toks": 256}, "no room for a prompt"),
        ({"until": ["x" * 300]}, "stop strings"),
    ],
)
def test_what_generation_lacks_is_refused(
    ours: OfframpLM, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        ours.generate_until(asked("generate_until", ("Once", {"max_gen_toks": 4, **options})))


def test_sampling_is_drawn_request_by_request(ours: OfframpLM) -> None:
    """Repeats differ from each other, and a run from none before it."""
    options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 16, "until": []}
    requests = asked("generate_until", *[(TEXTS[0], options)] * 3)
    first = ours.generate_until(requests)
    assert len(set(first)) == 3
    assert ours.generate_until(requests) == first


def test_chat_templates_are_the_models(ours: OfframpLM, theirs: HFLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for ready in (True, False):
        mine = ours.apply_chat_template(messages, add_generation_prompt=ready)
        assert mine == theirs.apply_chat_template(messages, add_generation_prompt=ready)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_values_out_of_range_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ({"batch_size": "many"}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 256}, "max_length must be from 1 to 255"),
        ({"plan": str(tmp_path / "none.json")}, "cannot read the plan"),
    ):
        with pytest.raises(OfframpError, match=said):
            OfframpLM(pretrained=str(checkpoint), backbone="hf", **arguments)


def tasks(folder: Path, cache: Path) -> None:
    """Two tasks over local data: choosing among answers, and writing one."""
    rows = [
        {"question": f"Question {i}?", "answers": ["yes", "no", "maybe so"], "right": i % 3}
        for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {folder / "rows.jsonl"}
  cache_dir: {cache}
test_split: train
doc_to_text: "{{{{question}}}}"
"""
    (folder / "choose.yaml").write_text(
        f"""task: local_choose
output_type: multiple_choice
{common}
doc_to_choice: answers
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
    )
    (folder / "write.yaml").write_text(
        f"""task: local_write
output_type: generate_until
{common}
doc_to_target: "{{{{answers[right]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
    )


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """As in a fresh process: the harness knows the model by what the command says, if at all."""
    others = {name: model for name, model in model_registry.items() if name != "offramp"}
    monkeypatch.setattr(model_registry, "_objs", others)
    own_tasks = partial(TaskManager, include_defaults=False)  # thousands of others take minutes
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks)
    monkeypatch.setattr("sys.argv", ["offramp-lm-eval", *words])
    command.main()


def test_the_command_is_the_harness_with_one_more_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its results say which plan, and how deep its tokens were."""
    (tmp_path / "tasks").mkdir()
    tasks(tmp_path / "tasks", tmp_path / "cache")
    plan = Plan(run=exit_run())
    write_plan(tmp_path / "plan.json", plan)
    run_command(
        monkeypatch,
        *("run", "--model", "offramp", "--include_path", str(tmp_path / "tasks")),
        *("--model_args", f"pretrained={checkpoint},plan={tmp_path / 'plan.json'},backbone=hf"),
        *("--tasks", "local_choose,local_write", "--output_path", str(tmp_path / "out.json")),
        *("--batch_size", "2", "--log_samples"),
    )
    [written] = tmp_path.glob("out_*.json")
    results = json.loads(written.read_text())
    assert set(results["results"]) == {"local_choose", "local_write"}
    assert "tokens scored: mean depth" in capsys.readouterr().err
    about = results["config"]["offramp"]
    assert Plan.model_validate_json(json.dumps(about["plan"])) == plan
    assert about["weights"] == "fp32"
    assert about["scoring"] == "replay"
    assert not about["lossless"]
    counted = sum(about["scored"]["depth_histogram"].values())
    assert counted == about["scored"]["tokens"] == 4 * len(" yes no maybe so")
    assert 2 < about["scored"]["mean_depth"] < 6
    assert about["scored"]["layers_saved"] == 1 - about["scored"]["mean_depth"] / 6
    [written_half] = about["written"]
    assert written_half["tokens"] <= 4 * 8
    assert 2 < written_half["mean_depth"] < 6


def test_the_command_says_in_one_line_what_is_wrong(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "tasks").mkdir()
    tasks(tmp_path / "tasks", tmp_path / "cache")
    with pytest.raises(SystemExit) as ended:
        run_command(
            monkeypatch,
            *("run", "--model", "offramp", "--include_path", str(tmp_path / "tasks")),
            *("--model_args", f"pretrained={checkpoint},max_length=999", "--tasks", "local_write"),
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("offramp: max_length must be")


@pytest.mark.real
def test_smollm2_scores_and_writes_as_the_harness_does(smol: offramp.Model) -> None:
    """A handful of real items, by the harness's own backend on the very same module."""
    theirs = HFLM(pretrained=smol.backbone.model, tokenizer=smol.tokenizer, batch_size=1)  # type: ignore[attr-defined]
    ours = OfframpLM(smol)
    requests = asked(
        "loglikelihood",
        ("The capital of France is", " Paris"),
        ("The capital of France is", " a large banana"),
        ("", "Once upon a time"),
    )
    for (a, greedy), (b, also) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert abs(a - b) < 1e-3
        assert greedy == also
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", ("Water boils at", options), ("Two and two", options))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


@pytest.mark.real
def test_evaluates_smollm2_is_the_harnesses_own(smol: offramp.Model, tmp_path: Path) -> None:
    """The same on real text."""
    theirs = HFLM(pretrained=smol.backbone.model, tokenizer=smol.tokenizer, batch_size=1)  # type: ignore[attr-defined]
    prompts = ["Water boils at", "The capital of France is", "Two and two", "Once upon a time"]
    agrees_with_evaluate(smol, theirs, prompts, tmp_path, 8)
