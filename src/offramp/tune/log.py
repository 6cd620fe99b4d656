"""What a run says: a progress bar, a line of JSON per step, a picture of the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from offramp.errors import OfframpError
from offramp.files import write_text, write_whole

LOG, CURVE = "log.jsonl", "losses.png"


class Log:
    """Keeps one line per step, also over a kill: a resumed run drops lines of steps it repeats."""

    def __init__(self, folder: Path, steps: int, done: int, *, show: bool) -> None:
        self._path = folder / LOG
        self.lines = [line for line in read_log(folder) if line["step"] <= done]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc="tune",
            unit="step",
            disable=not show,
            dynamic_ncols=True,
        )

    def add(self, line: dict[str, Any]) -> None:
        """Append the figures of a step.

        Raises:
            OfframpError: the file cannot be written.
        """
        self.lines.append(line)
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OfframpError(f"cannot write {self._path}: {error.strerror}") from error
        losses = " ".join(f"{depth}:{value:.2f}" for depth, value in line["losses"].items())
        said = f"{line['tokens_per_second']:.0f} tokens/s, loss {losses}"
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run so far; a line cut by a kill is left out."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            read = json.loads(line)
        except ValueError:
            break
        if not isinstance(read, dict) or not isinstance(read.get("step"), int):
            break  # no line of ours
        found.append(read)
    return found


def draw(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Draw the loss of every exit over the tokens seen, smoothed over a fiftieth of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    depths = sorted({int(depth) for line in lines for depth in line["losses"]})
    for depth in depths:
        points = [
            (line["seen"], line["losses"][str(depth)])
            for line in lines
            if str(depth) in line["losses"]
        ]
        axes.plot([x for x, _ in points], _smooth([y for _, y in points]), label=f"depth {depth}")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss per token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    write_whole(folder / CURVE, lambda path: figure.savefig(path, format="png", dpi=120))


def _smooth(values: list[float]) -> list[float]:
    keep = 1 - 1 / max(len(values) / 50, 1)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(keep * smoothed[-1] + (1 - keep) * value if smoothed else value)
    return smoothed
