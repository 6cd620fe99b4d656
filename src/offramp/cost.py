"""Prices: from counted rows and passes to operations, bytes and seconds, and what would pay.

One model of cost for every door. Of counted work all terms are there: layers (blocks of exits among
them), attention by context, exit checks, key and value fill, draft work thrown away. Two views need
no measurement: *flops* is what a compute-bound step costs, *bytes* (weights read) what a
memory-bound one does. Where a machine was measured, *seconds* says what both together do.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offramp.backbone import Shape
from offramp.meter import Meter
from offramp.paths import ATTENTION, MLP, attends, is_whole
from offramp.timing import Constants

_CONTEXT = 256
"""Tokens before the ones predicted, where nobody says how many."""
_MAX_WAITING = 16
"""Tokens that wait before a full-depth step, by default."""


def flops(work: Meter, shape: Shape, check_weights: int = 0) -> float:
    """Return operations: two per weight and row, four per key, head dimension and row.

    ``check_weights`` are those that one row of a cheap exit check multiplies.
    """
    return 2.0 * (
        shape.layer_weights * work.layer_tokens
        + shape.attention_weights * work.attention_tokens
        + shape.mlp_weights * work.mlp_tokens
        + shape.head_weights * work.head_rows
        + check_weights * work.check_rows
        + shape.hidden_size**2 * work.map_rows
        + shape.fill_weights * work.fill_rows
        + 2 * shape.attention_size * work.attended
    )


def weight_bytes(work: Meter, shape: Shape, check_weights: int = 0) -> float:
    """Return bytes of weights read, each pass reading its module's weights once.

    A cheap check's weights are held as precisely as the layers', not as the head's.
    """
    checks = check_weights * work.check_passes
    layers = shape.layer_weights * work.layer_passes + shape.fill_weights * work.fill_passes
    layers += shape.attention_weights * work.attention_passes
    layers += shape.mlp_weights * work.mlp_passes
    head = shape.head_weights * work.head_passes
    maps = shape.map_bytes_per_weight * shape.hidden_size**2 * work.map_passes
    return shape.bytes_per_weight * (layers + checks) + shape.head_bytes_per_weight * head + maps


def seconds(
    work: Meter, constants: Constants, shape: Shape | None = None, check_weights: int = 0
) -> float:
    """Return the predicted time of this work on the machine that was measured.

    A cheap exit check of ``check_weights`` weights takes its part, by bytes, of the head's time,
    and so does an exit's affine map, and half a layer of a layer's; all need ``shape``.
    """
    tally = work.tally
    layers = sum(n * constants.layer_seconds(rows) for rows, n in tally.layers.items())
    # A layer's time holds the attention of a text's first rows to each other; the rest is apart.
    attending = tally.layers + tally.attentions
    own = sum(n * rows * (rows + 1) // 2 for rows, n in attending.items())
    attention = constants.pair * (work.attended - own) + constants.key * (
        tally.keys - work.layer_tokens - work.attention_tokens
    )
    if shape is not None:
        for passes, part in ((tally.attentions, ATTENTION), (tally.mlps, MLP)):
            share = worth([part], shape)
            layers += share * sum(n * constants.layer_seconds(rows) for rows, n in passes.items())
    heads = sum(n * constants.head_seconds(rows) for rows, n in tally.heads.items())
    fills = sum(n * constants.fill_seconds(rows) for rows, n in tally.fills.items())
    checks = sum(n * constants.head_seconds(rows) for rows, n in tally.checks.items())
    if shape is not None and check_weights:
        checks *= check_in_heads(shape, check_weights)
    maps = sum(n * constants.head_seconds(rows) for rows, n in tally.maps.items())
    if shape is not None and maps:
        maps *= map_in_heads(shape)
    steps = tally.steps * (constants.step + _kept(work, constants, shape, check_weights))
    asks = tally.asks * constants.ask
    return layers + attention + heads + checks + maps + fills + steps + asks


def _kept(work: Meter, constants: Constants, shape: Shape | None, check_weights: int) -> float:
    """Return what a cache keeps of the layers and heads that a step reads, in seconds of a step."""
    if not work.tally.steps:
        return 0.0
    cheap = check_in_heads(shape, check_weights) if shape is not None and check_weights else 1.0
    heads = work.head_passes + cheap * work.check_passes
    layers: float = work.layer_passes
    if shape is not None:
        layers += work.attention_passes * worth([ATTENTION], shape)
        layers += work.mlp_passes * worth([MLP], shape)
    return constants.kept_seconds(layers / work.tally.steps, heads / work.tally.steps)


def worth(parts: Sequence[int], shape: Shape) -> float:
    """Return the weights of the parts of a path, one layer = 1."""
    marked = [part for part in parts if not is_whole(part)]
    halves = sum(shape.attention_weights if attends(p) else shape.mlp_weights for p in marked)
    return len(parts) - len(marked) + halves / shape.layer_weights


def full_depth(
    texts: Sequence[tuple[int, int]],
    shape: Shape,
    batch_size: int,
    *,
    batched: bool = True,
    ragged: bool = False,
) -> Meter:
    """Return the work of plain decoding of ``(prompt tokens, new tokens)`` at full depth.

    Follows the same pool: a text that ends makes room for the next; rows that come one per text
    share a pass, prompts of equal length too (of any length on a ragged backbone), unless the
    backbone runs texts one by one.
    """
    work = Meter()
    queue, active = list(reversed(texts)), list[tuple[range, int]]()
    while queue or active:
        fresh = [queue.pop() for _ in range(min(batch_size - len(active), len(queue)))]
        active += [(range(prompt), new) for prompt, new in fresh]
        for spans in _passes([span for span, _ in active], batched=batched, ragged=ragged):
            work.ran(shape.num_layers, spans)
        work.read(len(active))
        work.tally.steps += 1
        active = [(range(s.stop, s.stop + 1), left - 1) for s, left in active if left > 1]
    return work


def _passes(spans: Sequence[range], *, batched: bool, ragged: bool) -> Iterable[Sequence[range]]:
    """Return the positions that share a pass."""
    if ragged:
        return [spans]
    if not batched:
        return [[span] for span in spans]
    by_rows: dict[int, list[range]] = defaultdict(list)
    for span in spans:
        by_rows[len(span)].append(span)
    return by_rows.values()


def check_in_layers(shape: Shape) -> float:
    """Return the bytes of weights that one full-vocabulary exit check reads, one layer = 1."""
    precision = shape.head_bytes_per_weight / shape.bytes_per_weight
    return precision * shape.head_weights / shape.layer_weights


def cheap_check_in_layers(shape: Shape, check_weights: int) -> float:
    """Return the same of a cheap check, held as precisely as the layers, of so many weights."""
    return check_weights / shape.layer_weights


def check_in_heads(shape: Shape, check_weights: int) -> float:
    """Return the bytes that a cheap check of so many weights reads, one readout = 1."""
    return cheap_check_in_layers(shape, check_weights) / check_in_layers(shape)


def map_in_heads(shape: Shape) -> float:
    """Return the bytes that an exit's affine map reads, one readout = 1."""
    head = shape.head_bytes_per_weight * shape.head_weights
    return shape.map_bytes_per_weight * shape.hidden_size**2 / head


def fill_in_layers(shape: Shape) -> float:
    """Return the cost of one layer's keys and values, one layer = 1."""
    return shape.kv_weights / shape.layer_weights


def block_in_layers(shape: Shape) -> float:
    """Return the cost of a decoder block that an exit owns, one layer = 1.

    By bytes: it may be held more precisely than the layers are. Counted work does not tell the two
    apart, so what is predicted of a run's work takes a block for a layer.
    """
    held = shape.block_bytes_per_weight
    return 1.0 if held is None else held / shape.bytes_per_weight


def break_even_depth(shape: Shape, check_weights: int = 0) -> float:
    """Return the deepest exit that pays when every layer is checked and skipped layers filled.

    A token leaving at e costs e checks, e layers and L - e fills; the full model L layers and one
    head: e = (L + h - f L) / (1 + h - f). A cheap check of c layers leaves the head to run once
    for the token, as in the full model: e = (L - f L) / (1 + c - f).
    """
    h, f, depth = check_in_layers(shape), fill_in_layers(shape), shape.num_layers
    if check_weights:
        return depth * (1 - f) / (1 + cheap_check_in_layers(shape, check_weights) - f)
    return (depth + h - f * depth) / (1 + h - f)


@dataclass(frozen=True)
class Prices:
    """What the parts of a step cost: seconds where measured, else weights read in layers."""

    shape: Shape
    constants: Constants | None = None
    context: int = _CONTEXT

    def layers(self, count: float, rows: float = 1) -> float:
        """Return the price of ``count`` layers for ``rows`` new rows of one text.

        Halves of layers count by their weights, and so does then their context.
        """
        if self.constants is None:
            return count
        return count * self.constants.layer_seconds(rows, self.context)

    def head(self, rows: float = 1) -> float:
        """Return the price of a readout."""
        if self.constants is None:
            return check_in_layers(self.shape)
        return self.constants.head_seconds(rows)

    @property
    def ask(self) -> float:
        """Return the price of asking at an exit, beside what the check reads."""
        return 0.0 if self.constants is None else self.constants.ask

    def fill(self, count: int) -> float:
        """Return the price of the keys and values of ``count`` layers for one row."""
        if self.constants is None:
            return count * fill_in_layers(self.shape)
        return count * self.constants.fill_seconds(1)

    def own(self, depth: int | None) -> float:
        """Return the price of what the exit at ``depth`` owns for a row it reads out, no head."""
        price = block_in_layers(self.shape) * self.layers(1) if depth in self.shape.blocks else 0.0
        if depth in self.shape.maps:
            price += map_in_heads(self.shape) * self.head()
        return price

    def step(self, depth: float, heads: float = 1.0) -> float:
        """Return the price of a step of ``depth`` layers and ``heads`` readouts beside those."""
        if self.constants is None:
            return 0.0
        return self.constants.step + self.constants.kept_seconds(depth, heads)

    @property
    def full(self) -> float:
        """Return the price of a token at full depth."""
        depth = self.shape.num_layers
        return self.step(depth) + self.layers(depth) + self.head()


def path_ratio(
    shape: Shape,
    depth: float,
    constants: Constants | None = None,
    context: int = _CONTEXT,
    *,
    head: float = 1.0,
    speaks_at: int | None = None,
) -> float:
    """Return the predicted cost per token of a sub-model worth ``depth`` layers to full depth.

    Time where constants are given, for one text of ``context`` tokens; else weights read. ``head``
    is what its readout costs, the full one = 1; ``speaks_at`` the exit by whose readout it speaks.
    """
    price = Prices(shape, constants, context)
    layers = price.step(depth, head) + price.layers(depth) + price.own(speaks_at)
    return (layers + head * price.head()) / price.full


def exit_ratio(
    shape: Shape,
    exits: Sequence[int],
    shares: Sequence[float],
    constants: Constants | None = None,
    context: int = _CONTEXT,
    *,
    copy: bool = False,
    check: float = 1.0,
    choose: float = 0.0,
) -> float:
    """Return the predicted cost per token of leaving early against full depth.

    Time where constants are given, for one text of ``context`` tokens; else weights read. Tokens
    that wait go through the deeper layers with the next one that gets there: no weights are read
    for them, but the more rows take time. A block that an exit owns is a layer for every token that
    asks, and keys and values for one that passes later.

    Args:
        shape: the model.
        exits: where tokens are asked, ascending.
        shares: the share of tokens that leave at each exit; the rest runs to the end.
        constants: of the machine and backbone, where measured.
        context: tokens before the ones predicted.
        copy: skipped layers are filled at once, instead of tokens waiting for them.
        check: cost of asking a token, one readout of the full head = 1.
        choose: cost of then reading out a token that leaves, likewise; 0 where the check has.
    """
    price, depth = Prices(shape, constants, context), shape.num_layers
    going, start, run = 1.0, 0, 0.0
    cost = heads = 0.0
    looks = [check] * len(exits)  # the last layer may be an exit, for who is spared the full head
    asked = [price.ask] * len(exits)
    stops = zip((*exits, depth), (*shares, 0.0), (*looks, 1.0), (*asked, 0.0), strict=True)
    for stop, share, reads, ask in stops:
        passes, rows, forced = going, 1.0, 0.0
        if constants is not None and not copy:
            least = 1 / (1 + _MAX_WAITING)  # a full queue forces one, and does not ask it
            passes, forced = max(going, least), max(least - going + share, 0.0)
            rows = 1 / passes
        cost += passes * price.layers(stop - start, rows)
        run += passes * (stop - start)
        heads += going * reads + share * choose
        cost += going * price.own(stop) + max(going - forced, 0.0) * ask
        if stop in shape.blocks:
            cost += min(1 - going, 1.0 if copy else passes) * price.fill(1)
        if copy:
            cost += share * price.fill(depth - stop)
        going, start = going - share, stop
    return (cost + heads * price.head() + price.step(run, heads)) / price.full


def speculation_ratio(
    shape: Shape,
    depth: float,
    tokens: int,
    agreement: float,
    constants: Constants | None = None,
    context: int = _CONTEXT,
    *,
    head: float = 1.0,
    shared: int | None = None,
) -> float:
    """Return the predicted cost per token of self-speculation against plain decoding.

    Time where constants are given, for one text of ``context`` tokens; else weights read. Each of
    ``tokens`` drafts costs ``depth`` layers and a readout, ``head`` of the full one; the confirming
    step runs the other layers and the full head for all rows at once. A draft that skips layers has
    only its first ``shared`` ones in common with it. A run of right drafts is geometric in
    ``agreement`` (Leviathan et al. 2023, equation 1).
    """
    price = Prices(shape, constants, context)
    written = sum(agreement**i for i in range(tokens + 1))
    every = shape.num_layers  # drafts and confirmations take turns: the cache sees all layers
    # The last drafted token has not run the draft's layers yet, so the confirming step runs them.
    common = int(depth) if shared is None else shared
    speaks = price.own(common) if common == depth else 0.0
    draft = price.step(every) + price.layers(depth) + speaks + price.ask + head * price.head()
    passed = price.fill(1) if common == depth and common in shape.blocks else 0.0
    confirm = price.step(every) + price.layers(common) + passed + price.head(tokens + 1)
    confirm += price.layers(shape.num_layers - common, tokens + 1)
    return (tokens * draft + confirm) / (written * price.full)


@dataclass(frozen=True)
class Figures:
    """What a run did and what it cost; the keys every command shares."""

    tokens: int
    seconds: float
    depths: Sequence[int]
    work: Meter
    baseline: Meter
    shape: Shape
    check_weights: int = 0
    """Weights that one row of the run's cheap exit check multiplies."""
    constants: Constants | None = None
    """Of the machine and backbone, where they were measured."""

    def as_dict(self) -> dict[str, object]:
        """Return the figures by name; ratios are against full depth over the same tokens.

        What a machine that was not measured would take is None.
        """
        counted = sorted(Counter(self.depths).items())
        done, whole = (self.work, self.shape, self.check_weights), (self.baseline, self.shape)
        known = self.constants
        predicted = (
            None if known is None else seconds(self.work, known, self.shape, self.check_weights)
        )
        return {
            "tokens": self.tokens,
            **self.work.as_dict(),
            "flops_ratio": _ratio(flops(*done), flops(*whole)),
            "bytes_ratio": _ratio(weight_bytes(*done), weight_bytes(*whole)),
            "seconds": self.seconds,
            "predicted_seconds": predicted,
            "predicted_ratio": None
            if known is None or predicted is None
            else _ratio(predicted, seconds(self.baseline, known)),
            "tokens_per_second": _ratio(self.tokens, self.seconds),
            "mean_depth": sum(self.depths) / max(len(self.depths), 1),
            "depth_histogram": {str(depth): count for depth, count in counted},
        }


def _ratio(part: float, whole: float) -> float:
    """Return part / whole; before anything was done, nan."""
    return part / whole if whole else math.nan
