"""The layers of a Llama-like model in torch, on tensors of fixed shape: what a graph captures.

Nothing here reads a value on the host, and running twice on the same inputs is running once.
Not run on a GPU yet: its tests are on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp.fast.fused import Fused
from offramp.fast.rotary import Rotary
from offramp.fast.static import Store

_Turn = tuple[Tensor, Tensor]  # cosines and sines of each row, [N, 1, rotary]


@dataclass(frozen=True)
class Rows:
    """The inputs of one shape: N rows, and for attention G groups of R cells.

    A group holds rows of one text, so that the text's keys are fetched once for all of them.
    """

    hidden: Tensor  # [N, D]
    slot: Tensor  # [N] int64; 0 for padding
    position: Tensor  # [N] int64
    place: Tensor  # [N] int64: each row's cell
    cells: Tensor  # [G, R] int64: each cell's row; a spare cell names any


class Layers:
    """All layers of one model over one store of keys and values."""

    def __init__(self, fused: Fused, windows: Sequence[int], rotary: Rotary, store: Store) -> None:
        self._fused, self._facts = fused, fused.facts
        self._windows, self._rotary, self._store = windows, rotary, store

    def run(self, layers: Sequence[int], length: int, rows: Rows) -> Tensor:
        """Return ``[N, D]`` after ``layers``, whose rows look at positions below ``length``."""
        turns = self._turns(layers, rows.position)
        visible = {
            window: _visible(rows, length, window, self._facts.heads // self._facts.kv_heads)
            for window in {self._windows[layer] for layer in layers}
        }
        state = rows.hidden
        for layer in layers:
            gains = self._fused.layers[layer].gains
            queries, keys = self._projected(layer, self._norm(state, gains.get("before_attention")))
            self._keep(layer, rows, keys, turns)
            queries = self._heads(queries, gains.get("query_norm"), turns.get(layer))
            mixed = self._attend(layer, queries, rows, visible[self._windows[layer]])
            made = self.multiply(layer, "output", mixed)
            state = self._added(state, made, gains.get("after_attention"))
            made = self._mlp(layer, self._norm(state, gains.get("before_mlp")))
            state = self._added(state, made, gains.get("after_mlp"))
        return state

    def fill(self, layers: Sequence[int], rows: Rows) -> Tensor:
        """Keep the keys and values that ``layers`` make of these states, and return the states.

        Neighbouring layers share one product.
        """
        turns = self._turns(layers, rows.position)
        plain = None
        if self._fused.before is not None:  # one norm for all: only its gains differ
            plain = functional.rms_norm(
                rows.hidden.float(), rows.hidden.shape[-1:], None, self._fused.top.epsilon
            )
        for stretch in stretches(layers):
            made = self.multiply_stretch(stretch, rows.hidden, plain)
            for layer, keys in zip(stretch, made, strict=True):
                self._keep(layer, rows, keys, turns)
        return rows.hidden

    def read(self, states: Tensor) -> Tensor:
        """Return ``states [N, D]`` after the last norm."""
        return self._norm(states, self._fused.top.gains)

    def multiply(self, layer: int, kind: str, states: Tensor) -> Tensor:
        """Return the product of one matrix: all of a layer's go through here."""
        matrix = self._fused.layers[layer].matrices[kind]
        return functional.linear(states, matrix.weight, matrix.bias)

    def multiply_stretch(self, layers: range, states: Tensor, plain: Tensor | None) -> Tensor:
        """Return keys and values ``[layers, N, 2K]`` of ``states``, normed but for the gains."""
        chosen, fused = slice(layers.start, layers.stop), self._fused
        if plain is not None and fused.before is not None:
            normed = (plain * fused.before[chosen]).to(states.dtype)
        else:
            normed = states.expand(len(layers), -1, -1)
        made = torch.bmm(normed, fused.kv[chosen].mT)
        return made if fused.kv_bias is None else made + fused.kv_bias[chosen]

    def _projected(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries, and keys with values, each ``[N, width]``."""
        made = self.multiply(layer, "qkv", states)
        return made[:, : self._facts.queries], made[:, self._facts.queries :]

    def _keep(self, layer: int, rows: Rows, made: Tensor, turns: dict[int, _Turn]) -> None:
        """Store keys and values ``made [N, 2K]``, each row's at its slot and position."""
        keys, values = made.chunk(2, -1)
        gains = self._fused.layers[layer].gains.get("key_norm")
        heads = self._heads(keys, gains, turns.get(layer))
        self._store.keys[layer][rows.slot, :, rows.position] = heads
        self._store.values[layer][rows.slot, :, rows.position] = self._heads(values, None, None)

    def _heads(self, states: Tensor, gains: Tensor | None, turn: _Turn | None) -> Tensor:
        """Return ``[N, heads, size]``, normed (head by head or whole, as gains are) and turned."""
        if gains is not None:
            states = self._norm(states.unflatten(-1, (-1, len(gains))), gains).flatten(1)
        heads: Tensor = states.unflatten(-1, (-1, self._facts.head_size))
        if turn is None:
            return heads
        cosines, sines = turn
        turned, rest = heads.tensor_split([cosines.shape[-1]], -1)
        low, high = turned.float().chunk(2, -1)
        turned = torch.cat((low, high), -1) * cosines + torch.cat((-high, low), -1) * sines
        return torch.cat((turned.to(rest.dtype), rest), -1)

    def _turns(self, layers: Sequence[int], position: Tensor) -> dict[int, _Turn]:
        """Return the layers' rotary tables at these rows, each looked up once."""
        found: dict[int, _Turn] = {}
        turns = {}
        for layer in layers:
            table = self._rotary.table(layer)
            if table is not None:
                if id(table[0]) not in found:
                    found[id(table[0])] = (table[0][position, None], table[1][position, None])
                turns[layer] = found[id(table[0])]
        return turns

    def _attend(self, layer: int, queries: Tensor, rows: Rows, visible: Tensor) -> Tensor:
        """Return what each row found, ``[N, heads * size]``.

        The query heads that share keys are folded into the rows of a group: ``[G, kv heads,
        shared * R, size]``.
        """
        f, (groups, cells) = self._facts, rows.cells.shape
        shared, length = f.heads // f.kv_heads, visible.shape[-1]
        asked = queries[rows.cells].view(groups, cells, f.kv_heads, shared, f.head_size)
        asked = asked.permute(0, 2, 3, 1, 4).flatten(2, 3)
        owner = rows.slot[rows.cells[:, 0]]
        keys = self._store.keys[layer][:, :, :length][owner]
        values = self._store.values[layer][:, :, :length][owner]
        if f.softcap:
            scores = (asked @ keys.mT).float() * f.scale
            scores = torch.tanh(scores / f.softcap) * f.softcap
            scores = scores.masked_fill(~visible, -torch.inf)
            found = torch.softmax(scores, -1).to(values.dtype) @ values
        else:
            found = functional.scaled_dot_product_attention(
                asked, keys, values, attn_mask=visible, scale=f.scale
            )
        by_row: Tensor = found.unflatten(2, (shared, cells)).permute(0, 3, 1, 2, 4)
        return by_row.reshape(groups * cells, f.queries)[rows.place]

    def _mlp(self, layer: int, states: Tensor) -> Tensor:
        gate, up = self.multiply(layer, "gate_up", states).chunk(2, -1)
        return self.multiply(layer, "down", _activated(gate, self._facts.activation) * up)

    def _added(self, state: Tensor, made: Tensor, gains: Tensor | None) -> Tensor:
        made = self._norm(made, gains)
        return state + (made if self._facts.residual == 1 else made * self._facts.residual)

    def _norm(self, states: Tensor, gains: Tensor | None) -> Tensor:
        if gains is None:
            return states
        normed = functional.rms_norm(states.float(), (len(gains),), gains, self._fused.top.epsilon)
        return normed.to(states.dtype)


def stretches(layers: Sequence[int]) -> list[range]:
    """Cut an ascending list of layers into runs of neighbours."""
    found: list[range] = []
    for layer in layers:
        if found and found[-1].stop == layer:
            found[-1] = range(found[-1].start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    return found


def _visible(rows: Rows, length: int, window: int, shared: int) -> Tensor:
    """Return ``[G, 1, shared * R, length]`` bool: which keys each cell's row may see."""
    keys = torch.arange(length, device=rows.position.device)
    own = rows.position[rows.cells][..., None]
    visible = keys <= own
    if window:
        visible = visible & (keys > own - window)
    return visible[:, None].repeat(1, 1, shared, 1)


def _activated(gate: Tensor, activation: int) -> Tensor:
    """Apply the activation of this number in ``layout.ACTIVATIONS``."""
    if activation == 0:
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if activation == 1 else "none")
