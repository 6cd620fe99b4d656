"""The protocol of whatever runs layers. The loops above it know nothing else of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from offramp.batch import Span
from offramp.errors import UsageError
from offramp.meter import Meter
from offramp.paths import is_whole, named
from offramp.probe import Readout
from offramp.watch import Ran, Watch


@dataclass(frozen=True)
class Shape:
    """What the loops and the cost model need to know of a model; weights counted in elements."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    context: int
    """Most positions of one text."""
    layer_weights: int
    """Matrix weights one token multiplies in one decoder layer (a token's own experts only)."""
    head_weights: int
    """Matrix weights of the vocabulary head."""
    kv_weights: int
    """Matrix weights that make the keys and values of one layer."""
    fill_weights: int
    """Matrix weights that this backbone's ``fill`` really multiplies per layer."""
    attention_size: int
    """Query heads times head size: context cost per key is 4 x this many operations."""
    bytes_per_weight: float
    kv_bytes: float
    """Bytes of one stored coordinate of a key or value, steps included."""
    head_bytes_per_weight: float
    """The vocabulary head may be held more precisely than the layers."""
    map_bytes_per_weight: float = 4.0
    """Of the affine maps that exits own."""
    attention_weights: int = 0
    """Of ``layer_weights``, those of the attention; 0 where a layer has no such half."""
    block_bytes_per_weight: float | None = None
    """Of the decoder blocks that exits own; None: as of the layers."""
    blocks: tuple[int, ...] = ()
    """Exits that own a decoder block: a layer more for every row that asks there."""
    maps: tuple[int, ...] = ()
    """Exits that own an affine map."""

    @property
    def mlp_weights(self) -> int:
        """Return those of ``layer_weights`` that are not the attention's."""
        return self.layer_weights - self.attention_weights


class Backbone(Protocol):
    """Runs any layers on any rows of many texts, keeping keys and values per text and layer.

    One thread owns a backbone: its methods are not safe to call at once.
    """

    shape: Shape
    meter: Meter
    name: str
    """What kind it is, as the command line names it: "fast" or "hf"."""
    weights: str
    """How it holds its weights: "fp32", "bf16", "int8", "int4"."""
    build: str
    """Which code it runs by: a change of it may change the time a layer takes."""
    batched: bool
    """Whether several texts share a call; else they run one by one."""
    ragged: bool
    """Whether they share it when they bring different numbers of rows, too."""
    fingerprint: str
    """Hash of the configuration and weights, by which plans know their model."""
    blocks: Mapping[int, int]
    """Exits that own a decoder block, and the index of its layer, L or more, as any other's.

    It holds the positions that passed its exit, so it stands beside the layer before the exit.
    """
    apart: frozenset[int]
    """Exits that own an affine map or a head: no other depth's rows can share their readout."""

    @property
    def halves(self) -> bool:
        """Return whether paths may hold halves: each layer is its attention and then its MLP."""

    def open(self) -> Any:
        """Return a slot for a new text's keys and values."""

    def close(self, slot: Any) -> None:
        """Give the slot back."""

    def embed(self, spans: Sequence[Span]) -> Tensor:
        """Return the inputs of the first layer for these rows, ``[N, D]``."""

    def run(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> Tensor:
        """Run ``hidden [N, D]`` through ``layers`` in order, appending keys and values.

        Every layer must hold exactly ``span.start`` positions of each span's text. A layer's mark
        (see :mod:`offramp.paths`) says that only its attention or its MLP is to run, where the
        backbone has ``halves``.
        """

    def run_until(
        self,
        segments: Sequence[Sequence[int]],
        hidden: Tensor,
        spans: Sequence[Span],
        watch: Watch,
    ) -> Ran:
        """Run one or more of these segments of layers, as :meth:`run` would.

        It goes on past an exit, one between two segments, only where it is certain that the policy
        would let no asking row leave; to :meth:`run` the first segment alone is always right. Who
        looks at an exit with a block runs that, too, where all rows are to go.
        """

    def fill(self, layers: Sequence[int], hidden: Tensor, spans: Sequence[Span]) -> None:
        """Append the keys and values that ``layers`` would compute if their input were ``hidden``.

        The same state goes into every layer (CALM, section 3.1; LITE). Layers shorter than a
        span's start are an error, as for ``run``.
        """

    def readout(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, V]`` of states ``[N, D]`` after ``depth`` layers.

        An affine map or a head that the exit at this depth owns is used; the states of an exit that
        owns a block are the block's output.
        """

    def shortlist(self, tokens: Tensor) -> Readout:
        """Return a readout of these vocabulary entries alone: logits ``[N, len(tokens)]``.

        It and :meth:`low_rank` are for checks; their rows are counted apart from the full head's.
        """

    def low_rank(self, rank: int) -> Readout:
        """Return a readout by the head's best approximation of this rank: logits ``[N, V]``."""

    def refined(self) -> Readout:
        """Return a readout of all entries whose largest logits are exact: logits ``[N, V]``.

        The others may be off by what a rough look at their weights is off. Its rows are counted as
        a cheap check's; where a rough look is no cheaper it is :meth:`readout` itself.
        """

    def trim(self, slot: Any, length: int, *, first_layer: int = 0) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on.

        That includes the blocks of exits behind ``first_layer``.
        """


def must_halve(backbone: Backbone, parts: Sequence[int]) -> None:
    """Refuse halves of layers on a backbone that runs whole ones only.

    Raises:
        UsageError: some part is a half, and it does.
    """
    some = next((part for part in parts if not is_whole(part)), None)
    if some is not None and not backbone.halves:
        raise UsageError(
            f"the path holds {named(some)}, half of a layer, and this model's layers run as wholes "
            f"only on the {backbone.name} backbone"
        )


def from_layer(first_layer: int, num_layers: int, blocks: Mapping[int, int]) -> list[int]:
    """Return the layers from ``first_layer`` on, and the blocks of the exits behind it."""
    behind = [layer for depth, layer in blocks.items() if depth > first_layer]
    return [*range(first_layer, num_layers), *behind]
