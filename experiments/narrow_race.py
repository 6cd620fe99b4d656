r"""A narrow task against other engines: tuned models under plans, and the first in llama.cpp or HF.

    python experiments/narrow_race.py --rows e2e/test.jsonl --weights int8 \
        --arm "fine-tuned, full depth" runs/sft full --arm certified e2e-16 e2e-16 \
        --against llama.cpp hf --peers .venv-peers/bin/python --out results/race_e2e.json

Other engines open the first arm's model, whole: what the task takes without us. Those that read
GGUF files alone can open another model of its shape (--others default), which takes as long but
writes other tokens. Everybody reads the same prompts, one by one, and writes as many tokens, in
turns; the first round warms up. How good the answers are is another question (narrow.py), and so
is how long they get.
"""

from __future__ import annotations

import argparse
import random
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from command import command
from narrow_arms import Arm, open_arms, shown
from narrow_data import read_rows
from tqdm import tqdm

from offramp.bench.figures import rows
from offramp.bench.own import ceiling_meter, take_turn
from offramp.bench.peers import OURS, THEIRS, opening_order, peer_contestants
from offramp.bench.race import Case, Contestant, race
from offramp.cli.output import environment, finish
from offramp.fast.pack import BYTES
from offramp.text import encode
from offramp.timing import constants


def main() -> None:
    """Race, print a line per contestant, and write the record."""
    options = _options()
    torch.set_num_threads(options.threads)
    arms = open_arms(options.arm, options.weights)
    prompts = sorted({row["prompt"] for row in read_rows(options.rows)})
    drawn = random.Random(options.seed).sample(prompts, min(options.prompts, len(prompts)))
    tokenizer = arms[0].model.tokenizer
    case = Case([encode(tokenizer, p, raw=True) for p in drawn], options.tokens, alone=True)
    ours = [_contestant(arm, first=arm is arms[0]) for arm in arms]
    longest = options.tokens + max(map(len, case.prompts))
    with ExitStack() as stack:
        others = options.others or options.arm[0][1]
        source = None if others == "default" else others
        order = opening_order(source, longest, None, trust_remote_code=False)
        theirs, versions = peer_contestants(options.against, options.peers, order, stack)
        who = [*ours, *theirs]
        with tqdm(total=len(who) * (options.rounds + 1), unit="turn", leave=False) as bar:
            run = race(who, case, options.rounds, ceiling_meter(), lambda _name: bar.update())
    found = rows(run)
    for row in found:
        speed, share = row.decode_tokens_per_second, row.ratio_to_full
        print(row.name, row.reason or f"{speed:.1f} tokens/s, {share:.2f} of full depth")
    facts = environment()
    record = {
        "command": command(),
        "model": shown(arms[0].model.name),
        "others": shown(others),
        "seed": options.seed,
        "versions": facts["versions"] | versions,
        "machine": facts["machine"]
        | {"memory_gb_per_second": median(c.bytes_per_second for c in run.ceilings) / 1e9},
        "prompts": len(drawn),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rows": [asdict(row) for row in found],
    }
    finish(record, as_json=False, out=options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="of narrow_data.py: test.jsonl")
    parser.add_argument(
        "--arm", nargs=3, action="append", required=True, metavar=("NAME", "MODEL", "PLAN")
    )
    parser.add_argument("--weights", choices=list(BYTES), default="int8")
    parser.add_argument("--against", nargs="*", choices=[*OURS, *THEIRS], default=[])
    parser.add_argument("--others", metavar="MODEL", help="what they open: the first arm's")
    parser.add_argument("--peers", type=Path, help="python of the peers' environment")
    parser.add_argument("--prompts", type=int, default=8, help="drawn by the seed")
    parser.add_argument("--tokens", type=int, default=32, help="as many as an answer has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _contestant(arm: Arm, *, first: bool) -> Contestant:
    backbone = arm.model.backbone
    return Contestant(
        f"{backbone.name} {backbone.weights} {arm.name}",
        partial(take_turn, backbone, arm.plan, constants(backbone)),
        f"own {backbone.name}",
        backbone.weights,
        full=first,
        lossless=first,
    )


if __name__ == "__main__":
    main()
