"""The heads of one model, packed once: the shared one, exits' own, and cheap ones made of each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from offramp.fast.layout import INT8, ExactStruct, MatrixStruct
from offramp.fast.memory import Arena
from offramp.fast.pack import GROUP, LANES, Format, Packed, pack, pack_roughly, rounding, widest
from offramp.heads import low_rank
from offramp.probe import Readout

SURE = 5.0
"""Standard errors to either side that a rough logit is allowed: of two logits one would have to be
off by seven to be taken for the other: once in a hundred billion, for states that are spread over
their inputs as the last norm's gains are."""
_STATES = (GROUP / 12) ** 0.5 / 127
"""The most that a state's own rounding to 8 bits is off, of its norm: one value is all of it."""


@dataclass(eq=False)
class CheapHead:
    """One matrix, or two in sequence, and what must stay in memory for them."""

    down: MatrixStruct | None
    head: MatrixStruct
    weights: int
    """Weights that one row multiplies."""
    kept: list[Tensor]
    exact: ExactStruct | None = None
    """Settles the largest logits of a head that is held as codes."""


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """A cheap check as a :data:`~offramp.probe.Readout`: its part of every head there is."""

    read: Callable[[CheapHead, Tensor, int], Tensor]
    """Reads states ``[N, D]`` of this depth through a head."""
    shared: CheapHead
    own: Mapping[int, CheapHead]
    """Of the exits that own a head, by depth."""

    @property
    def heads(self) -> list[CheapHead]:
        """Return all there are."""
        return [self.shared, *self.own.values()]

    def __call__(self, hidden: Tensor, depth: int) -> Tensor:
        """Return logits ``[N, outputs]`` of states ``[N, D]`` after ``depth`` layers."""
        return self.read(self.own.get(depth, self.shared), hidden, depth)


class Heads:
    """Every head that reads states of one model; cheap ones are made when first asked for.

    Those that choose tokens are exact where it counts: held as codes, their largest logits are made
    once more, from the weights as they are.

    Args:
        shared: the model's own, packed.
        plain: the same, not packed.
        gains: ``[D]`` of the last norm.
        form: the format of the layers, which cheap heads share.
        read: reads states through a cheap head, as :class:`Reading` does.
    """

    def __init__(
        self,
        shared: CheapHead,
        plain: nn.Linear,
        gains: Tensor,
        form: Format,
        read: Callable[[CheapHead, Tensor, int], Tensor],
    ) -> None:
        self._plain, self._gains, self._form, self._read = plain, gains, form, read
        self._arena = Arena()
        self.shared = _settled(shared, plain, gains, form)
        self.give({})

    def give(self, plain: Mapping[int, nn.Linear]) -> None:
        """Let the exits at these depths own these heads."""
        self._plain_own = plain
        self._own = {
            depth: own_head(head, self._gains, self._form, self._arena)
            for depth, head in plain.items()
        }
        self._cheap: dict[Hashable, Reading] = {}

    def at(self, depth: int) -> CheapHead:
        """Return what reads states after ``depth`` layers."""
        return self._own.get(depth, self.shared)

    def shortlist(self, tokens: Tensor) -> Reading:
        """Return a reading of these vocabulary entries alone."""
        made = partial(shortlist_head, tokens=tokens, form=self._form, arena=self._arena)
        return self._reading(tuple(tokens.tolist()), made)

    def low_rank(self, rank: int) -> Reading:
        """Return a reading by each head's best approximation of this rank."""
        gains, form, arena = self._gains, self._form, self._arena
        made = partial(low_rank_head, gains=gains, rank=rank, form=form, arena=arena)
        return self._reading(rank, made)

    def refined(self) -> Reading:
        """Return a reading of all entries with 4 bits, and of those on top again as they are."""
        made = partial(refined_head, gains=self._gains, arena=self._arena)
        return self._reading("refined", made)

    def _reading(self, key: Hashable, made: Callable[[nn.Linear], CheapHead]) -> Reading:
        if key not in self._cheap:
            own = {depth: made(head) for depth, head in self._plain_own.items()}
            self._cheap[key] = Reading(self._read, made(self._plain), own)
        return self._cheap[key]

    def behind(self, look: Readout | None) -> CheapHead | None:
        """Return what ``look`` sees where no exit owns a head; None: it is none of these."""
        if look is None:
            return self.shared
        return next((made.shared for made in self._cheap.values() if made is look), None)

    def multiplied(self) -> dict[str, tuple[int, int]]:
        """Return the (rows, calls) of the heads that choose, and of those that check."""
        checks = [head for reading in self._cheap.values() for head in reading.heads]
        return {"head": _total([self.shared, *self._own.values()]), "check": _total(checks)}


def shortlist_head(head: nn.Linear, tokens: Tensor, form: Format, arena: Arena) -> CheapHead:
    """Return these entries of the head."""
    weight = head.weight.detach()[tokens]
    made = _Packer(form, arena)
    bias = None if head.bias is None else head.bias.detach()[tokens]
    return CheapHead(None, made.packed(weight, bias), weight.numel(), made.kept)


def low_rank_head(
    head: nn.Linear, gains: Tensor, rank: int, form: Format, arena: Arena
) -> CheapHead:
    """Return the head's best approximation of this rank for states of a norm with these gains."""
    up, down = low_rank(head.weight.detach(), gains, rank)
    made = _Packer(form, arena)
    bias = None if head.bias is None else head.bias.detach()
    structs = (made.packed(down, None), made.packed(up, bias))
    return CheapHead(*structs, up.numel() + down.numel(), made.kept)


def refined_head(head: nn.Linear, gains: Tensor, arena: Arena) -> CheapHead:
    """Return the head with 4 bits a weight, and what settles which of its logits is the largest."""
    made = _Packer("int4", arena)
    packed, off = pack_roughly(head.weight.float(), _shares(gains))
    struct = made.struct(packed, None if head.bias is None else head.bias.detach())
    rough = CheapHead(None, struct, head.weight.numel(), made.kept)
    return _exact(rough, head, off)


def own_head(head: nn.Linear, gains: Tensor, form: Format, arena: Arena) -> CheapHead:
    """Return an exit's own head, as precise as the model's is beside layers of this format."""
    made = _Packer(head_form(form), arena)
    bias = None if head.bias is None else head.bias.detach()
    struct = made.packed(head.weight.detach(), bias)
    if form == "int4":
        struct.format = INT8
    packed = CheapHead(None, struct, head.weight.numel(), made.kept)
    return _settled(packed, head, gains, form)


def _settled(packed: CheapHead, head: nn.Linear, gains: Tensor, form: Format) -> CheapHead:
    """Let a head that chooses settle its largest logits, if it holds its weights as codes."""
    if head_form(form) != "int8":
        return packed
    return _exact(packed, head, rounding(head.weight.detach().float(), _shares(gains)))


def _exact(packed: CheapHead, head: nn.Linear, off: Tensor) -> CheapHead:
    """Return the head with what settles its largest logits.

    Args:
        packed: its weights as codes.
        head: as it is.
        off: ``[outputs]``, the variance of a logit by the rounding of its weights, for a state of
            norm 1. Many small errors add up, of either sign, nearly as a normal one; so do those of
            the state's own rounding, wherever in it that is.
    """
    weight = head.weight.detach().float().contiguous()  # mostly the model's own, not a copy
    errors = SURE * (off + _STATES**2 * widest(weight)).sqrt()
    exact = ExactStruct(rows=weight.data_ptr(), errors=errors.data_ptr())
    return replace(packed, kept=[*packed.kept, weight, errors], exact=exact)


def _shares(gains: Tensor) -> Tensor:
    """Return each input's share of a state's squared norm, behind a norm with these gains."""
    squares = gains.detach().float().square()
    return squares / squares.sum().clamp_min(torch.finfo(torch.float32).tiny)


def head_form(form: Format) -> Format:
    """Return how a head that chooses tokens is packed: with int4 it keeps 8 bits."""
    return "int8" if form == "int4" else form


class _Packer:
    def __init__(self, form: Format, arena: Arena) -> None:
        self.kept: list[Tensor] = []
        self._form, self._arena = form, arena

    def packed(self, weight: Tensor, bias: Tensor | None) -> MatrixStruct:
        return self.struct(pack(weight, self._form), bias)

    def struct(self, packed: Packed, bias: Tensor | None) -> MatrixStruct:
        struct = MatrixStruct(
            weights=self._address(packed.data),
            format=packed.format,
            outputs=packed.outputs,
            inputs=packed.inputs,
        )
        if bias is not None:
            spare = bias.new_zeros(LANES)  # the kernels read whole vectors
            struct.bias = self._address(torch.cat((bias, spare)).float())
        return struct

    def _address(self, tensor: Tensor) -> int:
        self.kept.append(self._arena.keep(tensor))
        return self.kept[-1].data_ptr()


def _total(heads: list[CheapHead]) -> tuple[int, int]:
    return sum(head.head.rows for head in heads), sum(head.head.calls for head in heads)
