"""``make families``: opens a tiny model of every family and holds the laws on it, as a table.

Columns: full depth equals the untouched model; greedy self-speculation equals ``generate``; random
exits then a drain give the full logits; ragged texts share a call; and what Hugging Face's own
``assistant_early_exit`` does on the same model.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils import logging

from offramp.batch import Text
from offramp.cli.output import environment, finish
from offramp.errors import UnsupportedModelError
from offramp.hf.backbone import HFBackbone
from offramp.hf.open import open_model
from offramp.policy import fixed
from offramp.request import Request
from offramp.speculate import Draft, speculate
from offramp.step import step
from tests.families import FAMILIES, REFUSED, build
from tests.tools import assert_close, own_answer, own_logits, texts_of


def full_depth(backbone: HFBackbone) -> None:
    """Prefill, then token by token."""
    [ids] = texts_of(backbone, [20])
    text = Text(ids[:7], backbone.open())
    rows = [step(backbone, [text]).logits]
    for token in ids[7:]:
        text.ids.append(token)
        rows.append(step(backbone, [text]).logits)
    assert_close(own_logits(backbone, ids)[6:], torch.cat(rows))


def lossless(backbone: HFBackbone) -> None:
    """An exit and a layer subset draft, in a ragged batch of three."""
    prompts = texts_of(backbone, [5, 9, 3], seed=1)
    expected = [own_answer(backbone, prompt, 16) for prompt in prompts]
    requests = [Request(prompt, 16) for prompt in prompts]
    for draft in (Draft((0, 1, 2), 3), Draft((0, 1, 3, 5), 3)):
        got: list[list[int]] = [[], [], []]
        for token in speculate(backbone, requests, draft):
            got[token.index].append(token.id)
        assert expected == got


def drained(backbone: HFBackbone) -> None:
    """Tokens that left at random depths catch up exactly."""
    [ids] = texts_of(backbone, [16], seed=2)
    draw = random.Random(0)
    text = Text(ids[:6], backbone.open())
    step(backbone, [text])
    for token in ids[6:-1]:
        text.ids.append(token)
        step(backbone, [text], fixed(draw.choice([1, 2, 3, 4, 5])))
    text.ids.append(ids[-1])
    waiting = text.num_waiting
    rows = step(backbone, [text], tails=[waiting + 1]).logits
    assert_close(own_logits(backbone, ids)[-waiting - 1 :], rows)


CHECKS = {"full depth": full_depth, "lossless": lossless, "exits, drained": drained}


def _verdict(check: Callable[[HFBackbone], None], backbone: HFBackbone) -> str:
    try:
        check(backbone)
    except AssertionError:
        return "NO"
    return "yes"


def hugging_face(name: str) -> str:
    """Return what ``assistant_early_exit`` does; on a model of its own, for it may break it."""
    model = build(name)
    ids = torch.tensor([[5, 9, 17, 33, 21]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    try:
        expected = model.generate(ids, pad_token_id=0, **options)
        got = model.generate(ids, pad_token_id=0, assistant_early_exit=2, **options)
    except Exception as error:  # whatever it raises is the finding
        return type(error).__name__
    return "same text" if torch.equal(expected, got) else "OTHER TEXT"


def _opened(name: str) -> dict[str, str]:
    """Return the findings for a family that should be accepted."""
    row = {"family": name}
    try:
        backbone = open_model(build(name))
    except UnsupportedModelError as error:
        return row | {"full depth": f"REFUSED: {error}"}
    row |= {title: _verdict(check, backbone) for title, check in CHECKS.items()}
    row["ragged batch"] = "yes" if backbone.batched else "one by one"
    return row | {"HF early exit": hugging_face(name)}


def _refused(name: str) -> dict[str, str]:
    try:
        open_model(build(name))
    except UnsupportedModelError as error:
        return {"family": name, "reason": str(error)}
    return {"family": name, "reason": "ACCEPTED"}


def main() -> None:
    """Print the table; end with status 1 if a family that should be accepted is not, or differs."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    accepted = [_opened(name) for name in tqdm(FAMILIES)]
    refused = [_refused(name) for name in REFUSED]
    table = Table(*accepted[0])
    for row in accepted:
        table.add_row(*row.values())
    console = Console(width=120)
    console.print(table)
    console.print(f"{len(accepted)} families; refused, with the reason:")
    for row in refused:
        console.print(f"  {row['family']}: {row['reason']}", markup=False, soft_wrap=True)
    if len(sys.argv) > 1:
        record = {"command": "make families", **environment()}
        record |= {"accepted": accepted, "refused": refused}
        finish(record, as_json=False, out=Path(sys.argv[1]))
    found = [value for row in accepted + refused for value in row.values()]
    sys.exit(any(value == "NO" or value.startswith(("REFUSED", "ACCEPTED")) for value in found))


if __name__ == "__main__":
    main()
