"""Keeps a narrow model as a bit per weight over some layers of the default one: what is shipped.

    python experiments/ship_narrow.py runs/e2e-s2 --layers runs/sixteen.json \
        --rows e2e/named2.jsonl --tokens 60000 --out src/offramp/shipped/e2e-16

MODEL is a checkpoint that was cut out of the default model (``offramp export --plan``) and tuned
on; --layers is the plan it was cut by. With --tokens, the change is first taught to bear its
rounding: each step runs the rounded weights, and its gradients go to those that are not (straight
through), until the rounded model says what MODEL says of the answers in --rows (KL). A run that is
killed begins anew.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from offramp.card import Base, Data, read_card, write_card
from offramp.hf.backbone import fingerprint
from offramp.hf.cut import cut
from offramp.hf.delta import DELTA, is_grouped, rounded, write_delta
from offramp.hf.load import load_checkpoint
from offramp.plan import read_plan
from offramp.runs import Path as SubModel
from offramp.tune.data import Example, read_examples

ROWS = 16
"""Examples of a step."""
RATE = 1e-4
"""Peak learning rate; it falls to nothing by a straight line."""


def main() -> None:
    """Write the folder, and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=Path, required=True, help="the plan it was cut by")
    parser.add_argument("--rows", help="what to teach the rounded model on")
    parser.add_argument("--tokens", type=int, default=0, help="how much of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.tokens and not options.rows:
        parser.error("--tokens are of --rows; give a file")
    whole, tokenizer, name = load_checkpoint(None)
    run, card = read_plan(options.layers).run, read_card(options.model)
    assert isinstance(run, SubModel), "no plan of a sub-model"
    assert card is not None, "no folder of a tuned model"
    known = Base(name=name, fingerprint=fingerprint(whole), layers=run.layers)
    base = cut(whole, run.layers)
    tuned, _, _ = load_checkpoint(str(options.model))
    if options.tokens:
        random.seed(options.seed)
        data = read_examples([options.rows], tokenizer, raw=True, max_length=128)
        seen = teach(base, tuned, data.examples, options.tokens)
        assert card.data is not None
        files = card.data.files | data.files
        told = Data(files=files, texts=card.data.texts, tokens=card.data.tokens + seen)
        card = card.model_copy(update={"data": told})
    options.out.mkdir(parents=True, exist_ok=True)
    write_delta(options.out, base, tuned)
    recipe = card.recipe.model_copy(update={"settings": _shipped(card.recipe.settings)})
    changes = {"base": known, "exits": (), "readouts": {}, "recipe": recipe}
    write_card(options.out, card.model_copy(update=changes))
    print(f"{(options.out / DELTA).stat().st_size / 1e6:.1f} MB for layers {list(run.layers)}")


def _shipped(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the folders of the machine that it was tuned on."""
    return {name: Path(v).name if name == "teacher" else v for name, v in settings.items()}


def teach(
    base: PreTrainedModel, tuned: PreTrainedModel, examples: Sequence[Example], tokens: int
) -> int:
    """Move the tuned weights to where rounding their change harms least; return the tokens seen."""
    student, _, _ = load_checkpoint(tuned.name_or_path)
    apart = [
        (weight, origin, wanted)
        for (_, weight), (_, origin), (_, wanted) in zip(
            student.named_parameters(),
            base.named_parameters(),
            tuned.named_parameters(),
            strict=True,
        )
        if is_grouped(weight.shape)
    ]
    teacher, _, _ = load_checkpoint(tuned.name_or_path)
    optimizer = torch.optim.AdamW([wanted for *_, wanted in apart], lr=RATE, weight_decay=0.0)
    assert len(examples) >= ROWS, "too few rows to learn from"
    mean = sum(len(one.ids) for one in examples) / len(examples)
    steps = max(round(tokens / mean / ROWS), 1)
    seen = 0
    with tqdm(total=steps, unit="step", desc="round") as bar:
        for step, batch in enumerate(islice(_batches(examples), steps)):
            optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 10, 1 - step / steps)
            with torch.no_grad():
                for weight, origin, wanted in apart:
                    weight.copy_(origin + rounded(wanted - origin))
            loss = _divergence(student, teacher, batch)
            loss.backward()
            for weight, _, wanted in apart:
                wanted.grad, weight.grad = weight.grad, None
            torch.nn.utils.clip_grad_norm_([wanted for *_, wanted in apart], 1.0)
            optimizer.step()
            seen += sum(len(one.ids) for one in batch)
            bar.set_postfix(kl=f"{loss.item():.4f}", refresh=False)
            bar.update()
    return seen


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    order = list(examples)
    for start in cycle(range(0, len(order) - ROWS + 1, ROWS)):
        if start == 0:
            random.shuffle(order)
        yield order[start : start + ROWS]


def _divergence(student: Any, teacher: Any, batch: Sequence[Example]) -> Tensor:
    """Return the mean KL from the teacher over the answers' tokens."""
    ids = pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True)
    real = pad_sequence([torch.ones(len(one.ids)).long() for one in batch], batch_first=True)
    places = torch.zeros_like(ids).bool()
    for row, one in enumerate(batch):
        places[row, one.first - 1 : len(one.ids) - 1] = True

    def said(model: Any) -> Tensor:
        states = model.model(input_ids=ids, attention_mask=real).last_hidden_state[places]
        return log_softmax(model.lm_head(states), -1)

    with torch.no_grad():
        wanted = said(teacher)
    return kl_div(said(student), wanted, reduction="batchmean", log_target=True)


if __name__ == "__main__":
    main()
