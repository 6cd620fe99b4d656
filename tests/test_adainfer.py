"""AdaInfer's classifiers: fitted as libraries fit them, read causally, refused where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycrfsuite
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from offramp.adainfer.fit import fit_classifier
from offramp.adainfer.judge import cross_validate, judge, policy_of
from offramp.adainfer.labels import joined, labels, table
from offramp.adainfer.linear import Linear, estimator
from offramp.checks import Shortlist
from offramp.classifier import Classified, Classifier, Kind, load_classifier
from offramp.decode import decode
from offramp.errors import OfframpError, UsageError
from offramp.gate import fit_gate
from offramp.plan import Plan
from offramp.policy import Threshold
from offramp.probe import Probe
from offramp.runs import Exit
from offramp.trace import Trace, record, replay
from tests.test_cli import Shell
from tests.test_cli import shell as shell
from tests.tools import BOTH, Recorder, collected, counted, opened, texts_of

EXITS = (1, 2, 4, 5)
LEARNT: tuple[Kind, ...] = ("svm", "logistic", "crf")


def toy(texts: int = 60, *, seed: int = 0, easy: float = 0.0) -> Trace:
    """A trace of four exits, three rows a text, whose gap grows with depth as rightness does."""
    draw = torch.Generator().manual_seed(seed)
    rows = 3 * texts
    hard = torch.rand(rows, 1, generator=draw) - easy
    known = torch.linspace(0.2, 0.9, 4) - hard + 0.2 * torch.randn(rows, 4, generator=draw)
    margin = torch.sigmoid(3 * known)
    other = 0.3 * torch.rand(rows, 4, generator=draw)
    right = known + 0.3 * torch.randn(rows, 4, generator=draw) > 0.2
    chosen = torch.cat((torch.where(right, 7, 8), torch.full((rows, 1), 7)), 1).int()
    return Trace(
        exits=EXITS,
        num_layers=6,
        fingerprint="toy",
        ids=torch.randint(7, 9, (5 * texts,), generator=draw, dtype=torch.int32),
        lengths=(5,) * texts,
        rows=(3,) * texts,
        chosen=chosen,
        loss=torch.rand(rows, 5, generator=draw),
        scores={
            "margin": margin,
            "max_prob": margin + (1 - margin) * other,
            "entropy": margin.square(),
            "saturation": torch.cat((torch.full((rows, 1), -1.0), margin[:, 1:]), 1),
        },
    )


def scores(classifier: Classifier, trace: Trace, upto: int = len(EXITS)) -> Tensor:
    """A classifier's score of every row at the first exits, ``[T, upto]``."""
    found, probe = [], None
    for k, depth in enumerate(trace.exits[:upto]):
        known = {name: values[:, k] for name, values in trace.scores.items()}
        probe = Probe(depth, trace.num_layers, None, None, probe, known)
        found.append(classifier.score(probe))
    return torch.stack(found, 1)


# -- as the libraries fit and predict


@pytest.mark.parametrize("kind", ["svm", "logistic"])
@pytest.mark.parametrize("pooled", [True, False])
def test_linear_classifiers_are_those_of_scikit_learn(kind: Linear, pooled: bool) -> None:
    """Its pipeline, fitted to the same data, scores other data as the stored numbers do."""
    trace, other = toy(), toy(seed=1)
    names = ("margin", "max_prob", "depth")
    ours = scores(fit_classifier(trace, kind, features=names, pooled=pooled), other)
    rows, right = table(trace, names).numpy(), trace.agrees.numpy()
    new = table(other, names).numpy()
    flat = (rows.reshape(-1, 3), right.reshape(-1))
    for k in range(len(EXITS)):
        theirs = make_pipeline(StandardScaler(), estimator(kind))
        theirs.fit(*(flat if pooled else (rows[:, k], right[:, k])))
        np.testing.assert_allclose(ours[:, k], theirs.decision_function(new[:, k]), atol=1e-6)


@pytest.mark.parametrize("pooled", [True, False])
def test_the_random_field_is_crfsuites(pooled: bool, tmp_path: Path) -> None:
    """Fitted by CRFsuite, its marginals over each prefix are our causal probabilities, to 1e-6."""
    trace, other = toy(), toy(6, seed=1)
    names = ("margin", "max_prob")
    ours = torch.sigmoid(scores(fit_classifier(trace, "crf", pooled=pooled), other))
    rows = table(trace, names)
    dims = (0, 1) if pooled else (0,)
    mean, spread = rows.mean(dims), rows.std(dims, unbiased=False)

    def items(row: Tensor) -> list[dict[str, float]]:
        named = []
        for k, values in enumerate((row - mean) / spread):
            place = "" if pooled else f"@{k}"
            named.append({f"{n}{place}": v.item() for n, v in zip(names, values, strict=True)})
            named[-1][f"bias{place}"] = 1.0
        return named

    trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False)
    trainer.set_params(
        {
            "c1": 0,
            "c2": 1,
            "epsilon": 1e-12,
            "delta": 1e-14,
            "max_iterations": 5000,
            "feature.possible_states": True,
            "feature.possible_transitions": True,
            "feature.minfreq": -1e9,  # it takes sums of values for counts
        }
    )
    for row, right in zip(rows, trace.agrees, strict=True):
        trainer.append(items(row), ["stop" if one else "go" for one in right])
    trainer.train(str(tmp_path / "model"))
    tagger = pycrfsuite.Tagger()
    tagger.open(str(tmp_path / "model"))
    for row, mine in zip(table(other, names), ours, strict=True):
        for k in range(len(EXITS)):
            tagger.set(items(row)[: k + 1])
            assert abs(tagger.marginal("stop", k) - mine[k].item()) < 1e-6


@pytest.mark.parametrize("kind", LEARNT)
def test_a_classifier_beats_the_more_frequent_answer(kind: Kind) -> None:
    """On texts held out, where there is something to learn."""

    def make(trace: Trace) -> Classifier:
        return fit_classifier(trace, kind)

    judged = cross_validate(make, toy(), label="final", exit_prompt=True)
    for one in judged.exits:
        assert one.accuracy > max(one.right, 1 - one.right) - 0.03
    middle = judged.exits[1]
    assert middle.accuracy > max(middle.right, 1 - middle.right) + 0.1
    assert 1 < judged.mean_depth < 5
    assert sum(one.leaves for one in judged.exits) < 1


def test_the_rule_is_a_threshold_on_the_gap() -> None:
    """0.8, whatever it is shown; it replays as the plain threshold does."""
    trace = toy()
    policy = policy_of(fit_classifier(trace, "rule"))
    plain = Threshold("margin", tuple((depth, 0.8) for depth in EXITS))
    assert torch.equal(replay(trace, policy).depths, replay(trace, plain).depths)


# -- pointwise and causal


@pytest.mark.parametrize("kind", LEARNT)
def test_a_row_is_judged_by_itself_and_by_no_later_exit(kind: Kind) -> None:
    """The same alone and in company, whatever later exits say."""
    trace = toy()
    classifier = fit_classifier(trace, kind, pooled=False)
    together = scores(classifier, trace)
    alone = [scores(classifier, trace.part([text])) for text in range(len(trace.lengths))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    torch.testing.assert_close(together[:, :2], scores(classifier, trace, 2), rtol=0, atol=1e-12)


def test_only_a_random_field_remembers() -> None:
    """Another gap at the first exit moves its score at the second, and no other's."""
    trace = toy()
    changed = replace(trace, scores={n: v.clone() for n, v in trace.scores.items()})
    changed.scores["margin"][:, 0] = 0
    for kind in LEARNT:
        classifier = fit_classifier(trace, kind)
        moved = scores(classifier, changed)[:, 1] - scores(classifier, trace)[:, 1]
        assert bool(moved.any()) == (kind == "crf")


def test_a_classifier_that_looks_back_is_asked_at_every_exit() -> None:
    """From the first it was fitted at; one that does not may be asked anywhere."""
    trace = toy()
    Classified(fit_classifier(trace), ((4, 0.0),))
    for classifier in (
        fit_classifier(trace, "crf"),
        fit_classifier(trace, features=("saturation",)),
    ):
        Classified(classifier, ((1, 3.0), (2, 0.0)))
        with pytest.raises(UsageError, match="looks back"):
            Classified(classifier, ((2, 0.0), (4, 0.0)))


# -- labels, and traces joined and parted


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_labels_are_what_they_say(seed: int, texts: int) -> None:
    """Stable is final from there on; gold is the text's own next token, shifted by one."""
    trace = toy(texts, seed=seed)
    final, stable = labels(trace, "final"), labels(trace, "stable")
    for k in range(len(EXITS)):
        assert torch.equal(stable[:, k], final[:, k:].all(1))
    ids = trace.ids.reshape(texts, 5)
    assert torch.equal(trace.targets.reshape(texts, 3), ids[:, 2:])
    assert torch.equal(labels(trace, "gold")[0, 0], trace.chosen[0, 0] == ids[0, 2])


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)))
def test_traces_joined_and_parted_are_the_same_rows(order: list[int]) -> None:
    """In any order of texts, hidden states and all."""
    trace = replace(toy(5), hidden=torch.randn(15, 5, 4), prompts=(9, 8, 7, 6, 5))
    again = joined([trace.part([text]) for text in order])
    whole = again.part([order.index(text) for text in range(5)])
    assert (whole.lengths, whole.rows) == (trace.lengths, trace.rows)
    assert whole.prompts == trace.prompts
    assert joined([trace, replace(trace, prompts=None)]).prompts is None
    for name in ("ids", "chosen", "loss", "hidden"):
        assert torch.equal(getattr(whole, name), getattr(trace, name))
    for name, values in trace.scores.items():
        assert torch.equal(whole.scores[name], values)


def test_what_is_judged_was_not_fitted_to() -> None:
    """Every text is held out once, and never by a classifier that saw it."""
    trace = toy(10)
    trace = replace(trace, ids=torch.arange(50, dtype=torch.int32))
    held: list[int] = []

    def make(seen: Trace) -> Classifier:
        held.extend(set(range(50)) - set(seen.ids.tolist()))
        return fit_classifier(seen)

    judged = cross_validate(make, trace, label="final", folds=4)
    assert sorted(held) == list(range(50))
    assert (judged.texts, judged.tokens) == (10, 30)


# -- the loop


def fitted(name: str, kind: Kind, **settings: Any) -> Classifier:
    """A classifier of a tiny model, fitted on random text."""
    backbone = opened(name)
    texts = [(ids, 1) for ids in texts_of(backbone, [20] * 6, seed=9)]
    return fit_classifier(record(backbone, texts, EXITS), kind, **settings)


def halves(classifier: Classifier, trace: Trace) -> Classified:
    """A policy that lets half of the rows go where it is asked."""
    middle = scores(classifier, trace).quantile(0.7, 0).tolist()
    return Classified(classifier, tuple(zip(EXITS, middle, strict=True)))


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize(
    ("kind", "names"),
    [("svm", ("margin", "max_prob")), ("crf", ("entropy", "saturation", "depth"))],
)
def test_replay_of_a_classifier_is_the_loop(
    family: str, kind: Kind, names: tuple[str, ...]
) -> None:
    """Depths from recorded scores alone, in a batch that thins out, prompts that leave or stay."""
    backbone = opened(family)
    prompts = texts_of(backbone, [5, 8, 3], seed=1)
    classifier = fitted(family, kind, features=names)
    policy = halves(classifier, record(backbone, [(p, 1) for p in prompts], EXITS))
    for leaves in (False, True):
        requests = [Recorder().request(prompt, 12) for prompt in prompts]
        with counted(backbone):
            ids, depths = collected(
                decode(backbone, requests, policy, max_waiting=4, exit_prompt=leaves), 3
            )
        assert len({depth for text in depths for depth in text}) >= 3
        pairs = [(p + text, len(p)) for p, text in zip(prompts, ids, strict=True)]
        replayed = replay(record(backbone, pairs, EXITS), policy, max_waiting=4, exit_prompt=leaves)
        assert [depth for text in depths for depth in text] == replayed.depths.tolist()
        assert [token for text in ids for token in text] == replayed.chosen.tolist()


# -- files


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change a stored classifier's facts or tensors, and leave its digest as it was."""
    with safe_open(path, "pt") as file:
        said = dict(file.metadata())
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(said["offramp_classifier"])
    change(facts, parts)
    save_file(parts, path, said | {"offramp_classifier": json.dumps(facts)})


def test_classifiers_survive_the_disk(tmp_path: Path) -> None:
    """What is saved is what is loaded, bit for bit."""
    path = tmp_path / "c.safetensors"
    for kind in (*LEARNT, "rule"):
        classifier = fit_classifier(toy(), kind)
        classifier.save(path)
        loaded = load_classifier(path)
        assert loaded.facts == classifier.facts
        assert loaded.digest == classifier.digest
        assert torch.equal(scores(loaded, toy()), scores(classifier, toy()))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


TAMPERED: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "another weight": lambda _, parts: parts["weights"][1, 0].add_(1e-9),
    "another bias": lambda _, parts: parts["biases"].neg_(),
    "another transition": lambda _, parts: parts["transitions"][0, 1].add_(1),
    "another model": lambda facts, _: facts.update(fingerprint="mine"),
    "another check": lambda facts, _: facts.update(check="shortlist:9"),
    "another label": lambda facts, _: facts.update(label="gold"),
    "other figures": lambda facts, _: facts["fitted_on"].update(texts=10_000),
    "another signal": lambda facts, _: facts.update(features=["entropy", "margin"]),
    "an unknown kind": lambda facts, _: facts.update(kind="forest"),
    "an unknown key": lambda facts, _: facts.update(extra=1),
    "a later format": lambda facts, _: facts.update(format=2),
    "exits in disorder": lambda facts, _: facts.update(exits=[1, 4, 2, 5]),
    "an exit too deep": lambda facts, _: facts.update(exits=[1, 2, 4, 6]),
    "an exit too few": lambda facts, _: facts.update(exits=[1, 2, 4]),
    "a feature twice": lambda facts, _: facts.update(features=["margin", "margin"]),
    "a weight that is no number": lambda _, parts: parts["weights"][0, 0].fill_(torch.nan),
    "single precision": lambda _, parts: parts.update(biases=parts["biases"].float()),
    "no transitions": lambda _, parts: parts.pop("transitions"),
    "one tensor more": lambda _, parts: parts.update(more=torch.zeros(2)),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_classifier_is_refused(tmp_path: Path, how: str) -> None:
    """Whatever was changed: weights, facts, figures."""
    path = tmp_path / "c.safetensors"
    fit_classifier(toy(), "crf").save(path)
    rewritten(path, lambda *_: None)
    load_classifier(path)
    rewritten(path, TAMPERED[how])
    with pytest.raises(OfframpError, match=r"was changed since|is no offramp classifier"):
        load_classifier(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A missing one, text, a trace, gates, and one that needs a signal nobody has."""
    path = tmp_path / "c.safetensors"
    with pytest.raises(OfframpError, match="cannot read the classifier"):
        load_classifier(path)
    path.write_text("not a file of tensors")
    with pytest.raises(OfframpError, match="is no offramp classifier"):
        load_classifier(path)
    toy().save(path)
    with pytest.raises(OfframpError, match="is no offramp classifier"):
        load_classifier(path)
    fit_gate(replace(toy(), hidden=torch.randn(180, 5, 4))).save(path)
    with pytest.raises(OfframpError, match="is no offramp classifier"):
        load_classifier(path)
    one = fit_classifier(toy())
    facts = one.facts.model_copy(update={"features": ("margin", "tea_leaves")})
    replace(one, facts=facts).save(path)
    with pytest.raises(OfframpError, match="signal that is not installed"):
        load_classifier(path)


def test_a_plan_refuses_a_classifier_of_another_model_or_check(tmp_path: Path) -> None:
    """Before anything runs; its own model and check are taken."""
    own, other = opened("llama"), opened("gpt2")
    file = tmp_path / "c.safetensors"
    fitted("llama", "svm").save(file)
    settings = {"signal": "classifier", "thresholds": {1: 0.0}, "classifier": str(file)}
    Plan(run=Exit(**settings)).check(own)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fingerprint"):
        Plan(run=Exit(**settings)).check(other)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shortlist:8"):
        Plan(run=Exit(**settings, check=Shortlist(size=8))).check(own)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="need the file"):
        Plan(run=Exit(signal="classifier", thresholds={1: 0.0})).check(own)
    with pytest.raises(UsageError, match="no other signal"):
        Plan(run=Exit(signal="margin", thresholds={1: 0.0}, classifier=str(file))).check(own)
    with pytest.raises(UsageError, match="knows no exit 3"):
        Plan(run=Exit(**settings | {"thresholds": {3: 0.0}})).check(own)  # type: ignore[arg-type]


# -- bad input


def with_scores(change: Callable[[Tensor], object], *names: str) -> Trace:
    """A toy trace some of whose scores were changed in place."""
    trace = toy()
    for name in names:
        change(trace.scores[name])
    return trace


BAD: dict[str, tuple[Callable[[], Trace], str]] = {
    "too few texts": (lambda: toy().part([0, 1, 2]), "too few"),
    "all agree": (lambda: replace(toy(), chosen=torch.full((180, 5), 7).int()), "every row"),
    "none agrees": (
        lambda: replace(toy(), chosen=torch.tensor([8, 8, 8, 8, 7]).int().repeat(180, 1)),
        "no row",
    ),
    "constant features": (
        lambda: with_scores(lambda x: x.fill_(0.5), "margin", "max_prob"),
        "same",
    ),
    "scores that are no numbers": (
        lambda: with_scores(lambda x: x[3, 1].fill_(torch.nan), "margin"),
        "margin is not a finite",
    ),
    "infinite scores": (
        lambda: with_scores(lambda x: x[3, 1].fill_(torch.inf), "max_prob"),
        "max_prob is not a finite",
    ),
    "no scores": (lambda: replace(toy(), scores={}), "has no margin"),
    "no exits": (lambda: replace(toy(), exits=()), "no exit"),
}


@pytest.mark.parametrize("kind", LEARNT)
@pytest.mark.parametrize("wrong", BAD)
def test_what_nothing_can_be_fitted_to(kind: Kind, wrong: str) -> None:
    """One sentence with the remedy; no warning, no traceback of a library."""
    make, said = BAD[wrong]
    with pytest.raises(UsageError, match=said):
        fit_classifier(make(), kind)


@pytest.mark.parametrize("kind", LEARNT)
def test_one_constant_feature_and_one_hopeless_exit_do_no_harm(kind: Kind) -> None:
    """They have no weight, and the exit says what it always is."""
    trace = with_scores(lambda x: x.fill_(0.25), "max_prob")
    trace.chosen[:, 0] = 8
    classifier = fit_classifier(trace, kind, pooled=False)
    assert not classifier.weights[:, 1].any()
    assert bool((scores(classifier, trace)[:, 0] < 0).all())


def test_a_row_without_a_number_never_leaves() -> None:
    """A score that is NaN reaches no threshold, nor does what remembers it."""
    trace = with_scores(lambda x: x[7].fill_(torch.nan), "margin")
    for kind in LEARNT:
        done = replay(trace, policy_of(fit_classifier(toy(), kind)), exit_prompt=True)
        assert done.depths[7].item() == 6


def test_what_does_not_go_together_is_refused() -> None:
    """Features, traces, folds, tests of another model, exits that are missing."""
    trace = toy()
    for names in ((), ("margin", "margin"), ("tea_leaves",)):
        with pytest.raises(UsageError, match="features"):
            fit_classifier(trace, features=names)
    other: tuple[dict[str, Any], ...] = (
        *({"fingerprint": "x"}, {"exits": (1, 2, 3, 4)}, {"check": "shortlist:8"}),
        {"head": "shortlist:8"},
    )
    for changes in other:
        with pytest.raises(UsageError, match="differ in their"):
            joined([trace, replace(trace, **changes)])
    with pytest.raises(UsageError, match="no trace"):
        joined([])
    for folds in (1, 61):
        with pytest.raises(UsageError, match="folds"):
            cross_validate(fit_classifier, trace, label="final", folds=folds)
    classifier = fit_classifier(trace)
    with pytest.raises(UsageError, match="of a model of fingerprint x"):
        judge(classifier, replace(trace, fingerprint="x"), label="final")
    with pytest.raises(UsageError, match="shortlist:8, not full"):
        judge(classifier, replace(trace, check="shortlist:8"), label="final")
    with pytest.raises(UsageError, match="lacks"):
        judge(classifier, replace(trace, exits=(1, 2, 3, 5)), label="final")
    with pytest.raises(UsageError, match="not a number"):
        Classified(classifier, ((1, float("nan")),))
    remembers = fit_classifier(trace, "crf")
    wider = replace(trace, exits=(1, 2, 3, 4))
    with pytest.raises(UsageError, match="neighbouring"):
        replay(
            wider,
            Classified(replace_exits(remembers, (1, 2, 4, 5)), ((1, 0.0), (2, 0.0), (4, 0.0))),
        )


def replace_exits(classifier: Classifier, exits: tuple[int, ...]) -> Classifier:
    """The same classifier, of other exits."""
    return replace(classifier, facts=classifier.facts.model_copy(update={"exits": exits}))


# -- the command line


def test_fit_writes_what_generate_runs(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """From prompts or from traces; judged on texts held out and on another trace."""
    prompts, file = tmp_path / "p.txt", tmp_path / "c.safetensors"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(6)))
    trace = tmp_path / "t.safetensors"
    recorded = ("--prompts", prompts, "--max-new-tokens", 6, "--check", "shortlist:64")
    shell.json("trace", checkpoint, *recorded, "--out", trace)
    direct = shell.json("fit", checkpoint, *recorded, "--kind", "crf", "--out", file)
    again = shell.json("fit", "--trace", trace, "--kind", "crf", "--test", trace)
    assert direct["figures"]["held_out"] == again["figures"]["held_out"]
    assert direct["check"] == "shortlist:64"
    assert again["figures"][str(trace)]["tokens"] == 36
    depths = [one["depth"] for one in direct["figures"]["held_out"]["exits"]]
    asked = ("--classifier", file, "--prompts", prompts, "--max-new-tokens", 6)
    run = shell.json("generate", checkpoint, *asked)
    assert run["plan"]["run"]["thresholds"] == {str(depth): 0.0 for depth in depths}
    assert run["plan"]["run"]["check"] == {"kind": "shortlist", "size": 64}
    replayed = shell.json("trace", checkpoint, *asked[:4], "--max-new-tokens", 6)
    assert replayed["replay"]["mean_depth"] == pytest.approx(
        again["figures"][str(trace)]["mean_depth"]
    )
    never = "classifier=" + ",".join(f"{depth}:1000" for depth in depths)
    full = shell.json("generate", checkpoint, *asked, "--threshold", never, "--exit-prompt")
    assert full["mean_depth"] == 6
    status, out, _ = shell("fit", "--trace", trace, "--folds", 3)
    assert (status, "svm on texts held out" in out) == (0, True)


def test_fit_covers_gates(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """The file is what --check gate:FILE reads."""
    prompts, file = tmp_path / "p.txt", tmp_path / "g.safetensors"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(6)))
    asked = ("--prompts", prompts, "--max-new-tokens", 4)
    done = shell.json("fit", checkpoint, *asked, "--kind", "gate", "--exits", "2,4", "--out", file)
    assert done["figures"]["held_out"]["tokens"] == 24
    gate = ("--threshold", "gate=2:0.5,4:0.5", "--check", f"gate:{file}")
    assert shell.json("generate", checkpoint, *asked, *gate)["mean_depth"] <= 6


def test_fit_refuses_in_one_line(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    """Wrong usage is told before a model loads."""
    trace = tmp_path / "t.safetensors"
    toy(2).save(trace)
    shell.refused(2, "give traces to fit to", "fit", checkpoint)
    shell.refused(2, "give traces", "fit", checkpoint, "--prompt", "a", "--trace", trace)
    shell.refused(2, "a trace brings", "fit", checkpoint, "--trace", trace)
    shell.refused(2, "--label final", "fit", "--trace", trace, "--kind", "gate", "--label", "gold")
    shell.refused(2, "too few", "fit", "--trace", trace)
    shell.refused(2, "tea_leaves", "fit", "--trace", trace, "--features", "tea_leaves")
    missing = tmp_path / "none"
    shell.refused(1, "cannot read the trace", "fit", "--trace", missing)
    chosen = ("generate", checkpoint, "--prompt", "a")
    shell.refused(1, "cannot read the classifier", *chosen, "--classifier", missing)
    shell.refused(2, "--exit-prompt goes with", *chosen, "--exit-prompt")
