"""From prompts to a score table, and from a table to a router and its plan; for ``oracle``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.allocate.report import Report
    from offramp.allocate.table import ScoreTable
    from offramp.cli.tracing import Texts
    from offramp.model import Model
    from offramp.router import RouterWeights


def check_depths(model: Model, depths: tuple[int, ...], looks: tuple[int, ...]) -> None:
    """Refuse depths that the model lacks, and looks that not every option's prompt passes."""
    from offramp.policy import check_exits

    check_exits(depths, model.backbone.shape.num_layers)
    check_exits(looks, model.backbone.shape.num_layers)
    if looks[-1] > depths[0]:
        raise UsageError(
            f"--look {looks[-1]} is behind the first exit, {depths[0]}: a router may see only what "
            "every choice runs"
        )


def texts_to_score(
    model: Model,
    file: Path,
    limit: int | None,
    answers: str,
    max_new_tokens: int,
    batch_size: int,
    *,
    raw: bool,
) -> Texts:
    """Return prompts with answers of two tokens or more, which can be halved."""
    from offramp.allocate.table import must_be_enough
    from offramp.cli.tracing import own_answers
    from offramp.text import encode, read_prompts
    from offramp.tune.rows import read_rows

    texts: Texts
    if answers == "own":
        wanted = read_prompts(file, limit)
        must_be_enough(len(wanted))  # before anything is generated
        texts = own_answers(
            model, wanted, raw=raw, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    else:
        texts = []
        for row in read_rows([str(file)], limit=limit).rows:
            prompt = encode(model.tokenizer, row.prompt, raw=raw)
            answer = model.tokenizer(row.answer, add_special_tokens=False)["input_ids"]
            texts.append((prompt + answer[:max_new_tokens], len(prompt)))
    usable = [(ids, given) for ids, given in texts if len(ids) - given >= 2]
    must_be_enough(len(usable))
    return usable


def scored_table(
    model: Model,
    texts: Texts,
    depths: tuple[int, ...],
    looks: tuple[int, ...],
    score: Any,
    *,
    seed: int,
    batch_size: int,
) -> ScoreTable:
    """Return the table of these texts, with what a router sees of their prompts."""
    from tqdm import tqdm

    from offramp.allocate.score import features_of, from_trace
    from offramp.cli.tracing import traced

    made = from_trace(traced(model, texts, depths), model.id, score, seed=seed)
    with tqdm(texts, desc="prompts", unit="text", leave=False) as bar:
        prompts = (ids[:given] for ids, given in bar)
        features = features_of(model.backbone, prompts, looks, batch_size=batch_size)
    return made.with_features(features, looks)


def fitted_router(
    scored: ScoreTable, seed: int, *, needed: bool
) -> tuple[RouterWeights | None, Tensor | None]:
    """Return a router and its predictions out of the folds, where the table allows one."""
    from offramp.allocate.fit import LEAST_TEXTS, fit_router

    if not needed and (scored.features is None or len(scored.scores) < LEAST_TEXTS):
        return None, None
    return fit_router(scored, seed=seed)


def written_plan(
    scored: ScoreTable,
    fitted: RouterWeights,
    predicted: Tensor,
    router: Path,
    plan: Path | None,
    budgets: list[float],
) -> dict[str, Any] | None:
    """Write the router and the plan that uses it; return the plan."""
    from offramp.allocate.fit import price_of
    from offramp.paths import check_path
    from offramp.plan import Plan, write_plan
    from offramp.runs import Path as SubModel
    from offramp.runs import Route

    for way in scored.runs:
        if isinstance(way, SubModel):  # a route's prompts wait in front of whole layers
            check_path(way.layers, scored.model.num_layers)
    digest = fitted.save(router)
    if plan is None:
        return None
    price = price_of(predicted, scored.costs, budgets[0])
    run = Route(router=str(router), digest=digest, price=price, runs=scored.runs)
    made = Plan(model=scored.model, run=run)
    write_plan(plan, made)
    return made.model_dump(mode="json")


def as_record(scored: ScoreTable, done: Report, fitted: RouterWeights | None) -> dict[str, Any]:
    """Return what was found as a record; scores are teacher-forced if it says so."""
    import dataclasses

    return {
        "texts": len(scored.scores),
        "score": scored.score,
        "teacher_forced": scored.teacher_forced,
        "runs": [run.model_dump(mode="json") for run in scored.runs],
        "costs": scored.costs.tolist(),
        **dataclasses.asdict(done),
        "router": None if fitted is None else {"looks": list(fitted.exits), **fitted.fitted_on},
    }
