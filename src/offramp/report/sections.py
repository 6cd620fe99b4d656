"""From runs to sections: traces and full-depth runs join the runs that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from offramp.report import others, words
from offramp.report.charts import draw_depths
from offramp.report.parts import Picture, Section, Text
from offramp.report.runs import (
    Answer,
    BenchRun,
    Curve,
    EvaluateRun,
    Generated,
    Point,
    Run,
    Traced,
    TraceRun,
    TuneRun,
)
from offramp.report.seen import (
    columns,
    curve_picture,
    data_of,
    grid,
    reliability,
    trace_pictures,
    trace_section,
)
from offramp.report.speeds import draw_speeds
from offramp.report.tokens import Seen, plain, told
from offramp.shown import visible

_MOST_TOKENS = 20_000
"""Tokens of strips on one page; the figures are of all."""

Named = tuple[str, Run]
Key = tuple[Any, tuple[int, ...]]


def arrange(runs: Sequence[Named]) -> list[Section]:
    """Return a section per run; traces and full-depth runs join the runs that they belong to."""
    traces = [(name, run) for name, run in runs if isinstance(run, TraceRun)]
    made = [(name, run) for name, run in runs if isinstance(run, Generated)]
    fulls = [(name, run) for name, run in made if words.kind(run.plan) == "full"]
    adaptive = [pair for pair in made if pair not in fulls]
    sections, used = [], set[int]()
    for number, (name, run) in enumerate(adaptive or made, 1):
        full = _full(run, fulls) if adaptive else None
        joined = _joined(run, [trace for _, trace in traces])
        used.update(id(seen.run) for seen in joined.values())
        used.update(id(other) for other in ([full[1]] if full else []))
        used.add(id(run))
        sections.append(_generated(number, name, run, full, joined))
    for name, left in runs:
        if id(left) not in used:
            sections.append(_other(len(sections) + 1, name, left))
    return sections


def _full(run: Generated, fulls: Sequence[tuple[str, Generated]]) -> tuple[str, Generated] | None:
    """Return the run at full depth over the same prompts by the same model, if there is one."""
    asked = [answer.prompt for answer in run.outputs]
    for name, full in fulls:
        same = (full.model, full.raw, full.num_layers) == (run.model, run.raw, run.num_layers)
        if same and [answer.prompt for answer in full.outputs] == asked:
            return name, full
    return None


def _joined(run: Generated, traces: Sequence[TraceRun]) -> dict[Key, Seen]:
    """Return what traces know of this run's answers, by prompt and token ids."""
    asked = {_key(answer) for answer in run.outputs}
    return {
        _key(text): Seen(trace, text)
        for trace in traces
        if (trace.model, trace.num_layers) == (run.model, run.num_layers)
        for text in trace.texts
        if _key(text) in asked
    }


def _key(text: Answer | Traced) -> Key:
    return (words.prompt(text.prompt), text.token_ids)


def _generated(
    number: int,
    name: str,
    run: Generated,
    full: tuple[str, Generated] | None,
    joined: dict[Key, Seen],
) -> Section:
    counts = Counter(depth for answer in run.outputs for depth in answer.depths)
    traces = list({id(seen.run): seen.run for seen in joined.values()}.values())
    same = [value for seen in joined.values() for value in seen.same]
    cost = words.cost(run, full)
    shown = list(_within(run.outputs))
    texts = [
        _answer(number, i, run, full and full[1].outputs[i], joined) for i in range(len(shown))
    ]
    stem = f"run{number}"
    pictures = [
        Picture(
            f"{stem}-depths", "Where tokens left", words.DEPTHS, draw_depths(counts, run.num_layers)
        )
    ]
    for trace in traces:
        pictures += trace_pictures(stem, trace)
    if cost.ratio is not None and same:
        pictures.append(_against_time(stem, name, cost, same))
    return Section(
        title=name,
        about=words.about(run),
        headline=words.headline(run, counts),
        alerts=words.alerts(cost),
        figures=words.figures(run, counts, cost, same),
        missing=words.missing(name, full is not None, bool(joined), words.kind(run.plan)),
        pictures=pictures,
        texts=texts,
        left_out=len(run.outputs) - len(shown),
        legend=words.legend(run.num_layers),
        data=data_of(texts, traces[0] if traces else None),
    )


def _within(texts: Sequence[Answer | Traced]) -> Iterator[Answer | Traced]:
    tokens = 0
    for text in texts:
        tokens += len(text.token_ids)
        if tokens > _MOST_TOKENS and tokens > len(text.token_ids):
            return
        yield text


def _answer(
    number: int, i: int, run: Generated, full: Answer | None, joined: dict[Key, Seen]
) -> Text:
    answer = run.outputs[i]
    seen = joined.get(_key(answer))
    return Text(
        prompt=words.prompt(answer.prompt),
        tokens=told(answer, run.num_layers, run.plan, seen),
        verdict=words.compared(answer, full) if full else "",
        full=plain(full, answer, run.num_layers) if full else None,
        grid=None if seen is None else grid(f"run{number}-grid{i + 1}", seen, answer.depths),
        data=columns(seen) if seen else {},
    )


def _against_time(stem: str, name: str, cost: words.Cost, same: Sequence[bool]) -> Picture:
    assert cost.ratio is not None
    point = Point(name=name, cost=cost.ratio, quality=sum(same) / len(same))
    curve = Curve(
        quality="tokens on which the choice is the full model's",
        cost=f"time of a token / full depth ({cost.source})",
        points=(point,),
        full=Point(name="full depth", cost=1.0, quality=1.0),
    )
    return curve_picture(f"{stem}-time", curve, "Quality against time")


def _other(number: int, name: str, run: Run) -> Section:
    """Return the section of a run that joins no other."""
    match run:
        case Generated():
            return _generated(number, name, run, None, {})
        case TraceRun():
            return trace_section(number, name, run)
        case BenchRun():
            return _timed(number, name, run)
        case TuneRun():
            return _tuned(number, name, run)
        case EvaluateRun():
            return _compared(number, name, run)
    pictures = [curve_picture(f"curve{number}", run.curve)]
    about = " · ".join(part for part in (run.verb, run.model) if part)
    return Section(name, about, others.curve_headline(run.curve), pictures=pictures)


def _compared(number: int, name: str, run: EvaluateRun) -> Section:
    drawn = [
        curve_picture(
            f"evaluate{number}-{i}", one.curve, f"Quality against cost: {visible(one.task)}"
        )
        for i, one in enumerate(run.tasks, 1)
    ]
    pairs = zip(drawn, run.tasks, strict=True)
    return Section(
        title=name,
        about=others.about_comparison(run),
        headline=others.comparison_headline(run),
        alerts=others.slower_tasks(run),
        figures=others.comparison_figures(run),
        table=others.costs_table(run),
        pictures=[replace(it, table=others.scores_table(one)) for it, one in pairs],
    )


def _timed(number: int, name: str, run: BenchRun) -> Section:
    drawn = draw_speeds(run.rows)
    slow = [row for row in run.rows if row.ratio_to_full is not None and row.ratio_to_full < 0.995]
    return Section(
        title=name,
        about=others.about_bench(run),
        headline=others.bench_headline(run),
        alerts=others.slower(slow),
        pictures=[Picture(f"bench{number}-speeds", "Speed", words.SPEEDS, drawn)],
    )


def _tuned(number: int, name: str, run: TuneRun) -> Section:
    pictures = []
    for i, (text, rows) in enumerate(run.after.items(), 1):
        for when, these in (("before", run.before.get(text, ())), ("after", rows)):
            for picture in reliability(f"tune{number}-{i}-{when}", these):
                title = f"Is confidence honest? {when} tuning, on {visible(text)}"
                pictures.append(Picture(picture.name, title, picture.caption, picture.svg))
    return Section(name, f"tune · {run.model}", others.tune_headline(run), pictures=pictures)
