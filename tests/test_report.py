"""Reports without a browser: nothing gets out of the escaping, what is said is true, bad input."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from offramp.errors import OfframpError
from offramp.reliability import share_interval
from offramp.report.charts import draw_curve, draw_reliability
from offramp.report.page import embedded, render
from offramp.report.read import read_run
from offramp.report.runs import Curve, ExitRow
from offramp.report.sections import arrange
from offramp.text import pieces
from tests.conftest import byte_tokenizer
from tests.runs import FULL, evaluated, generated, saved, trace_of
from tests.test_cli import Shell, shell

__all__ = ["shell"]

ROOT = Path(__file__).parent.parent
EVIL = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "]]></svg><script>",
    "\u202egnp.exe\u2066",
    "\x1b[2J\x07\x00",
    "{{ 7 * 7 }}",
    "<!--",
)


class Seen(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, **results: dict[str, Any]) -> str:
    """The page of these results."""
    paths = saved(folder, **results)
    return render(arrange([(path.name, read_run(path)) for path in paths]))


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    """Hostile prompts, tokens, models, vocabularies and names of curves add no tag."""
    good = generated(["a"] * 8, ["b"] * 8)
    bad = generated(EVIL, EVIL, model=EVIL[1], backbone=EVIL[0])
    shown = page_of(tmp_path, run=good, full=good | {"plan": FULL}, trace=trace_of(good))
    word = trace_of(bad, word=EVIL[1])
    word["model"] = EVIL[1]
    word["curve"]["points"][0]["name"] = word["curve"]["quality"] = EVIL[3]
    hostile = page_of(tmp_path, run=bad, full=bad | {"plan": FULL}, trace=word)
    good_scores, bad_scores = evaluated({"a": 2.0}), evaluated({EVIL[0]: 2.0}, (EVIL[1],))
    bad_scores["tasks"][0]["scores"][0] |= {"against": EVIL[2], "verdict": EVIL[3]}
    shown += page_of(tmp_path, scores=good_scores)
    hostile += page_of(tmp_path, scores=bad_scores)
    plain, attacked = Seen(shown), Seen(hostile)
    drawn = {"path", "circle", "text", "line", "g", "rect", "title", "polyline"}
    assert [t for t in plain.tags if t not in drawn] == [t for t in attacked.tags if t not in drawn]
    assert plain.names == attacked.names
    assert not {"onerror", "onmouseover", "style", "src"} & attacked.names
    assert "\\x202e" in attacked.text
    assert not [c for c in hostile if c in "\u202e\u2066\x1b\x07\x00"]
    assert "49" not in re.findall(r"<span[^>]*>(.*?)</span>", hostile)
    for picture in re.findall(r"<svg.*?</svg>", hostile, flags=re.DOTALL):
        Seen(picture)


def test_embedded_data_cannot_end_its_element() -> None:
    """And is the same data again."""
    data = {"words": list(EVIL)}
    assert not set("<>&") & set(embedded(data))
    assert json.loads(embedded(data)) == data


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    """No address in it but the namespace of SVG, and a policy that allows none."""
    page = page_of(tmp_path, run=generated(), trace=trace_of(generated()))
    assert set(re.findall(r"https?://[^\"\s<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "unsafe-inline" not in page


def test_a_slow_run_says_so(tmp_path: Path) -> None:
    """In words, whether it was measured, predicted or counted; a fast one does not."""
    full = generated(plan=FULL, seconds=1.0)
    words = "Slower than full depth: a token took 2.00 times as long (measured, against full.json)"
    assert words in page_of(tmp_path, run=generated(seconds=2.0), full=full)
    assert "Slower" not in page_of(tmp_path, run=generated(seconds=0.5), full=full)
    predicted = page_of(tmp_path, run=generated(predicted_ratio=1.3))
    assert "1.30 times as long (predicted" in predicted
    counted = page_of(tmp_path, run=generated(flops_ratio=1.1, bytes_ratio=1.2))
    assert "Dearer than full depth by both counts" in counted


def test_the_headline_is_the_runs_own_count(tmp_path: Path) -> None:
    """Share that left early, mean depth, and where two answers part."""
    run, full = generated(["a", "b"]), generated(["a", "b"], plan=FULL)
    full["outputs"][1]["token_ids"][6] = 99
    depths = [depth for output in run["outputs"] for depth in output["depths"]]
    early = sum(depth < 12 for depth in depths) / len(depths)
    page = Seen(page_of(tmp_path, run=run, full=full)).text
    assert f"{early:.0%} of 40 tokens left early" in page
    assert f"{sum(depths) / 40:.1f} of 12 layers" in page
    assert "Identical to the full model's answer." in page
    assert "Differs from the full model's answer at token 7." in page


def test_a_trace_says_what_the_full_model_would_have_said(tmp_path: Path) -> None:
    """Of the run with the same prompt and tokens; another one's is shown apart."""
    run = generated(["a"])
    trace = trace_of(run)
    trace["texts"][0]["chosen"][3][-1] = 42
    joined = page_of(tmp_path, run=run, trace=trace)
    assert "The full model would have said “ word42”." in joined
    assert joined.count('class="run"') == 1
    assert "offramp trace --run" not in joined
    apart = page_of(tmp_path, run=generated(["b"]), trace=trace)
    assert apart.count('class="run"') == 2
    assert "offramp trace --run run.json" in apart


def test_a_trace_alone_shows_where_tokens_could_leave(tmp_path: Path) -> None:
    """Without a plan: the first depth from which on all exits agree with the last layer."""
    trace = trace_of(generated(["a"], tokens=2))
    text = trace["texts"][0]
    text["depths"] = None
    text["chosen"] = [[1] * 5 + [2] * 7, [2] * 12]
    page = page_of(tmp_path, trace=trace)
    assert "Could leave at 6 of 12" in page
    assert "Could leave at 1 of 12" in page
    assert "No plan was replayed" in page


def test_points_dearer_than_full_depth_are_told_apart() -> None:
    """Hollow, and in words; and intervals are drawn where they are given."""
    full = {"name": "full", "cost": 1, "quality": 1}
    cheap = {"name": "cheap", "cost": 0.5, "quality": 0.9, "low": 0.8, "high": 0.95}
    dear = {"name": "dear", "cost": 2, "quality": 0.9}
    facts = {"quality": "q", "cost": "c", "full": full, "points": [cheap, dear]}
    drawn = draw_curve(Curve.model_validate_json(json.dumps(facts)))
    assert "dear: cost 2, dearer than full depth" in drawn
    assert "95% interval 0.8 to 0.95" in drawn
    assert drawn.count('fill="#ffffff"') == 1


def test_a_comparison_says_what_it_cost_and_what_became_of_quality(tmp_path: Path) -> None:
    """Time of each task, an alert for those that are slower and no other, scores with intervals."""
    page = page_of(tmp_path, mixed=evaluated({"koala": 1.2, "vicuna": 0.8}))
    seen = Seen(page).text
    assert "Slower than full depth: koala (a token took 1.20 times as long)." in seen
    assert "A token takes 0.80 to 1.20 of full depth's time, at 0.90 of its operations." in seen
    for said in ("time / full depth, koala", "1.20x", "12, 1 too long", "8.2 of 12", "640 / 637"):
        assert said in seen
    assert page.count('<td class="bad">1.20 (1.15 to 1.25)</td>') == 2
    assert "<td>0.80 (0.75 to 0.85)</td>" in page
    assert "<td>0.61\n(0.47 to 0.76)</td><td>1.00</td><td>-0.39\n(-0.53 to -0.24)</td>" in page
    assert page.count('<td class="bad">worse</td>') == page.count("<figure") == 2
    fast = page_of(tmp_path, fast=evaluated({"koala": 0.8}))
    assert "Slower" not in fast
    longer = evaluated({"koala": 0.8})
    longer["tasks"][0]["time_ratio"] = {"median": 1.5, "low": 1.4, "high": 1.6}
    assert "koala (longer answers took 1.50 times as long)" in page_of(tmp_path, longer=longer)


def test_names_of_points_lie_on_nothing() -> None:
    """Neither on each other nor on a mark or an interval, however near the points are."""
    draw = random.Random(2)
    told = 0
    for _ in range(40):
        points = [
            {"name": f"point {i}", "cost": draw.uniform(0.1, 1.3), "quality": q, "low": q - 0.1,
             "high": q + 0.1}
            for i, q in enumerate(draw.choices((0.5, 0.55, 0.9), k=4))
        ]  # fmt: skip
        full = {"name": "full depth", "cost": 1, "quality": 0.9}
        facts = {"quality": "q", "cost": "c", "full": full, "points": points}
        drawn = str(draw_curve(Curve.model_validate_json(json.dumps(facts))))
        names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>(point \d|full depth)<', drawn)
        boxes = [(float(x), float(y) - 10, float(x) + 6 * len(n), float(y)) for x, y, n in names]
        reference = r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>cost of full depth<'
        ends = [(float(x), float(y)) for x, y in re.findall(reference, drawn)]
        boxes += [(x - 6 * 18, y - 10, x, y) for x, y in ends]
        marks = [
            (float(x) - 5, float(y) - 5, float(x) + 5, float(y) + 5)
            for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
        ]
        told += len(boxes)
        for i, box in enumerate(boxes):
            for other in [*boxes[:i], *marks]:
                apart = box[0] >= other[2] or other[0] >= box[2]
                assert apart or box[1] >= other[3] or other[1] >= box[3]
            assert box[0] >= 46  # where the axis is
    assert told > 40 * 3


def test_panels_of_reliability_do_not_touch() -> None:
    """Every word about an exit ends before the next panel begins."""
    bins = [{"tokens": 9, "confidence": 0.9, "agreement": 0.7}]
    rows = [ExitRow.model_validate({"depth": d, "reliability": tuple(bins)}) for d in (24, 28, 30)]
    drawn = str(draw_reliability(rows))
    frames = [float(x) for x in re.findall(r'<rect x="([\d.]+)"', drawn)]
    said = re.findall(r'<text x="([\d.]+)"[^>]*>((?:exit|over|right)[^<]*)<', drawn)
    assert [word for _, word in said][:2] == ["exit 24", "over-confident by 20%"]
    assert len(said) == 3 * 3
    for x, word in said:
        after = [frame - 30 for frame in frames if frame > float(x)]  # numbers stand before it
        assert float(x) + 6.6 * len(word) <= min(after, default=560)


def test_a_short_head_behind_the_last_layer_is_told_from_it(tmp_path: Path) -> None:
    """Both are at the same depth: the page says which is the whole model's."""
    run = generated(["a"], tokens=2)
    trace = trace_of(run)
    trace["exits"] = [*trace["exits"], 12]
    text = trace["texts"][0]
    text["chosen"] = [[*row, row[-1]] for row in text["chosen"]]
    text["scores"]["max_prob"] = [[*row, 0.5] for row in text["scores"]["max_prob"]]
    page = page_of(tmp_path, run=run, trace=trace)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["sections"][0]["depths"] == [*range(1, 13), "12, all"]


def test_a_page_of_fifty_answers_is_small(tmp_path: Path) -> None:
    """With every exit of 100 tokens each: under 5 MB."""
    run = generated([f"prompt {i}" for i in range(50)], tokens=100)
    page = page_of(tmp_path, run=run, trace=trace_of(run), full=run | {"plan": FULL})
    assert page.count('class="text"') == 50
    assert len(page.encode()) < 5e6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        (json.dumps(generated() | {"format": 2}), "of format 2, and this offramp reads 1"),
        (json.dumps(generated([])), "no examples"),
        (json.dumps(trace_of(generated([]))), "no examples"),
        ('{"rows": []}', "no run that a report can show"),
        ('{"outputs": []}', "generate it again"),
        (json.dumps(generated() | {"num_layers": "many"}), "num_layers"),
        (json.dumps({"curve": {"points": []}}), "curve.quality"),
        (json.dumps({"curve": [{"name": "a"}], "rounds": 3}), "no run that a report can show"),
        (json.dumps({"rows": [], "rounds": 3}), "no run that a report can show"),
        (json.dumps(evaluated({})), "no examples"),
    ],
)
def test_what_is_no_run_is_refused(shell: Shell, tmp_path: Path, content: str, words: str) -> None:
    """Status 1, one line, and no page."""
    file = tmp_path / "run.json"
    file.write_text(content)
    shell.refused(1, words, "report", file, "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_record_is_what_it_says_it_is(path: Path) -> None:
    """Of the records that are kept, those of a verb are shown, and experiments' are refused."""
    if "verb" in json.loads(path.read_text()):
        assert render(arrange([(path.name, read_run(path))]))
        return
    with pytest.raises(OfframpError, match="is no run that a report can show: give the JSON of"):
        read_run(path)


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A page would pair a token with another one's depth."""
    short = generated()
    short["outputs"][0]["depths"].pop()
    narrow = trace_of(generated())
    narrow["texts"][0]["chosen"][0].pop()
    for path in saved(tmp_path, short=short, narrow=narrow):
        with pytest.raises(OfframpError, match="is no run"):
            read_run(path)


def test_files_that_cannot_be_read_or_written(shell: Shell, tmp_path: Path) -> None:
    """One line each; a page is whole or not there."""
    [run] = saved(tmp_path, run=generated())
    shell.refused(1, "cannot read the run", "report", tmp_path / "none.json")
    shell.refused(1, "cannot write", "report", run, "--out", tmp_path / "no" / "r.html")
    shell.refused(1, "cannot write", "report", run, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == [run]


def test_pictures_are_files_of_their_own(shell: Shell, tmp_path: Path) -> None:
    """SVG that stands alone, and PNG."""
    run = generated()
    files = saved(tmp_path, run=run, trace=trace_of(run))
    base = ["report", *files, "--out", tmp_path / "r.html"]
    record = shell.json(*base, "--svg", tmp_path / "s", "--png", tmp_path / "p")
    names = {Path(path).stem for path in record["written"]}
    assert names == {"r", "run1-depths", "run1-curve", "run1-reliability", "run1-grid1"}
    assert (tmp_path / "s" / "run1-curve.svg").read_text().startswith("<svg")
    assert (tmp_path / "p" / "run1-grid1.png").read_bytes()[:4] == b"\x89PNG"


def test_generate_trace_and_report_are_three_commands(
    shell: Shell, checkpoint: Path, tmp_path: Path
) -> None:
    """On a real model: the trace of a run is the run's tokens, and replays its depths."""
    run, trace, page = (tmp_path / name for name in ("run.json", "trace.json", "r.html"))
    plan = ["--threshold", "margin=2:0.05,4:0.05"]
    made = shell.json(
        "generate", checkpoint, "--prompt", "hi", "--max-new-tokens", 9, *plan, "--out", run
    )
    assert "".join(made["outputs"][0]["pieces"]) == made["outputs"][0]["text"]
    found = shell.json("trace", checkpoint, "--run", run)
    trace.write_text(json.dumps(found))
    [text], [output] = found["texts"], made["outputs"]
    assert text["token_ids"] == output["token_ids"]
    assert text["depths"] == output["depths"]
    assert found["plan"] == made["plan"]
    for chosen, token, depth in zip(text["chosen"], text["token_ids"], text["depths"], strict=True):
        assert chosen[depth - 1] == token
    assert shell("report", run, trace, "--out", page)[0] == 0
    assert "margin" in page.read_text()
    shell.refused(2, "name one thing to trace", "trace", checkpoint, "--run", run, "--prompt", "a")
    shell.refused(2, "give the JSON of", "trace", checkpoint, "--run", trace)
    run.write_text(json.dumps(made | {"model": "another"}))
    shell.refused(2, "another wrote these answers", "trace", checkpoint, "--run", run)


def test_pieces_are_the_text() -> None:
    """Of whole and of broken characters."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("né 😀!")["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == "né 😀!"
    assert len(pieces(tokenizer, ids)) == len(ids)
    assert pieces(tokenizer, []) == []


def test_intervals_count_texts() -> None:
    """One text says nothing of others; equal texts leave no doubt; tokens of a text go together."""
    assert share_interval([(5, 10)]) is None
    assert share_interval([(5, 10)] * 4) == (0.5, 0.5)
    alike = share_interval([(100, 100), (0, 100)] * 5)
    assert alike is not None
    single = share_interval([(1, 1), (0, 1)] * 5)
    assert single == pytest.approx(alike)
    assert alike[0] > 0.1
