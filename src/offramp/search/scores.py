"""How much a layer changes the state: the cosine of what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from offramp.errors import OfframpError
from offramp.paths import named
from offramp.search.passes import Passes


def cosines(
    passes: Passes, path: Sequence[int], hidden: Tensor
) -> tuple[list[float], list[Tensor], Tensor]:
    """Return each layer's mean cosine of input and output along a path, its inputs, and the end.

    One minus this is the *block influence* of ShortGPT (Men et al. 2024, equation 1). ``hidden``
    ``[N, D]`` goes into the first of these layers; inputs and the end are such states.

    Raises:
        OfframpError: a cosine is no number.
    """
    found, inputs = [], []
    for layer, after in zip(path, passes.states(path, hidden), strict=True):
        score = mean_cosine(passes.counted(hidden), passes.counted(after))
        if not -1.001 <= score <= 1.001:  # NaN is not
            raise OfframpError(
                f"layer {named(layer)} makes states on these texts that are no numbers; "
                "try --weights fp32"
            )
        found.append(score)
        inputs.append(hidden)
        hidden = after
    return found, inputs, hidden


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Return the mean cosine of rows ``[T, D]`` with the same rows of another."""
    return cosine_similarity(first.float(), second.float(), dim=-1).mean().item()
