"""``offramp report``: one HTML page of runs; and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="JSON of generate, trace, bench, tune or evaluate, or any with a curve.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    svg: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write each picture as SVG.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write each picture as PNG (the extra plot)."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Show runs in one HTML file: which tokens left early, and what that cost.

    The page needs no network and no other file. A run at full depth beside it is compared text by
    text; a trace of it says what the full model would have said of each token.

    [bold]offramp generate --prompts P.txt --threshold max_prob=18:0.9 --json --out run.json[/bold]

    [bold]offramp trace --run run.json --json > trace.json[/bold]

    [bold]offramp report run.json trace.json --out report.html[/bold]
    """
    from offramp.report.page import write_page
    from offramp.report.pictures import check_drawable, write_pictures
    from offramp.report.read import read_run
    from offramp.report.sections import arrange

    if png is not None:
        check_drawable()
    page = arrange([(path.name, read_run(path)) for path in files])
    write_page(out, page)
    written = [out, *write_pictures(page, svg, png)]
    if json:
        from offramp.cli.output import finish

        finish(
            {"verb": "report", "written": [str(path) for path in written]}, as_json=True, out=None
        )
        return
    more = f", and {len(written) - 1} pictures" if written[1:] else ""
    print(f"Written to {out}{more}; open it in a browser.")
