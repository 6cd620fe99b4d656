"""Takes some exits of a tuned folder of readouts, in half the bytes, as what comes with offramp.

    python experiments/ship_exits.py runs/exits --exits 24 --out src/offramp/shipped/default-exits

The folder is one that ``offramp tune --recipe heads`` wrote over the default model; see
open_prompts.py for the commands. Weights are kept as bf16; the card says all else as it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from offramp.card import READOUTS, read_card, write_card
from offramp.readouts import read_readouts, write_readouts


def main() -> None:
    """Write the folder, and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exits", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    card = read_card(options.folder)
    assert card is not None, "no folder of a tuned model"
    kept = {
        depth: replace(
            readout, tensors={n: t.to(torch.bfloat16) for n, t in readout.tensors.items()}
        )
        for depth, readout in read_readouts(options.folder / READOUTS).items()
        if depth in options.exits
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_readouts(options.out / READOUTS, kept)
    told = {"exits": tuple(sorted(kept)), "readouts": {d: card.readouts[d] for d in sorted(kept)}}
    write_card(options.out, card.model_copy(update=told))
    print(f"{(options.out / READOUTS).stat().st_size / 1e6:.1f} MB for exits {sorted(kept)}")


if __name__ == "__main__":
    main()
