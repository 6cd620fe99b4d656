"""The options that several verbs share: one name and one sentence each. Parses; builds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp import shipped
from offramp.errors import UsageError

if TYPE_CHECKING:
    from offramp.plan import Plan
    from offramp.text import Prompt


class Weights(StrEnum):
    """How the weights are held in memory."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class BackboneName(StrEnum):
    """What runs the layers."""

    auto = "auto"
    fast = "fast"
    hf = "hf"


class KV(StrEnum):
    """What becomes of the layers that a leaving token skips."""

    exact = "exact"
    copy = "copy"


ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, local folder (a tuned model's, too) or GGUF file; SmolLM2-135M-Instruct by "
        "default, 'default-exits' with exits taught to speak; 'e2e-16', sixteen of its layers for "
        "a narrow task.",
        show_default=False,
    ),
]
PromptText = Annotated[
    str | None, typer.Option("--prompt", help="One prompt; '-' reads standard input.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help=".txt with a prompt per line, or .jsonl with prompt, instruction/input or messages.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N prompts.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Most new tokens of each answer.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at once.")]
WeightFormat = Annotated[
    Weights,
    typer.Option("--weights", help="How weights are held; int8 and int4: fast, on a CPU."),
]
BackboneOption = Annotated[
    BackboneName,
    typer.Option(
        "--backbone", help="Llama-like models at speed (fast), any by its modules (hf), or auto."
    ),
]
DeviceName = Annotated[
    str,
    typer.Option("--device", help="Where the model runs: cpu; cuda and others are untested."),
]
Remote = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run modelling code that comes with the checkpoint."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the result to this file, too.")]
PlanFile = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help="A plan file, 'full' for every layer and every token (default), or one that comes "
        "along: 'default-exits' or 'e2e-16', certified for the model of that name in int8, or "
        "'default-int4', all layers of the default model and a refined head, for int4.",
    ),
]
DraftDepth = Annotated[
    int | None,
    typer.Option("--draft", help="Lossless: draft with the first N layers, confirm with all."),
]
DraftDepths = Annotated[
    str | None,
    typer.Option(
        "--adapt",
        metavar="DEPTH,...",
        help="Lossless: draft from one of these depths, up to --draft-tokens, or not at all, as "
        "pays while decoding.",
    ),
]
DraftTokens = Annotated[int, typer.Option("--draft-tokens", min=1, help="Most tokens per draft.")]
DraftConfidence = Annotated[
    float,
    typer.Option(
        "--draft-confidence",
        min=0,
        max=1,
        help="End a draft after a token less probable than this.",
    ),
]
ExitDepth = Annotated[
    int | None, typer.Option("--exit", help="Lossy: run only the first N layers, for every token.")
]
ThresholdText = Annotated[
    str | None,
    typer.Option(
        "--threshold",
        metavar="SIGNAL=DEPTH:VALUE,...",
        help="Lossy: leave at the first depth where the signal reaches its value, "
        "e.g. max_prob=12:0.95,18:0.9.",
    ),
]
CheckText = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="full|refined|shortlist:N|tokens:FILE|low-rank:N|gate:FILE",
        help="With --threshold: what the signal looks at; with a gate, write --threshold "
        "gate=DEPTH:VALUE,...",
    ),
]
HeadText = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="full|refined|shortlist:N|tokens:FILE",
        help="What chooses tokens with --exit, those that leave with --threshold, or those that "
        "--draft or --adapt proposes: refined looks roughly, and at those on top again, which pays "
        "with int4 and greedy tokens; the N lowest token ids are the most frequent, a file lists "
        "those of a narrow task.",
    ),
]
ClassifierFile = Annotated[
    Path | None,
    typer.Option(
        "--classifier",
        help="Lossy: leave where the classifier that 'offramp fit' wrote says so; its own bar at "
        "every exit is 0, and --threshold classifier=DEPTH:VALUE,... sets others.",
    ),
]
SkipFile = Annotated[
    Path | None,
    typer.Option(
        "--skip",
        help="Lossy: each token passes by the layers that its skip gates name "
        "(gates.safetensors of 'offramp tune --recipe skip').",
    ),
]
ExitPrompt = Annotated[
    bool,
    typer.Option(
        "--exit-prompt", help="The prompt, too, may leave early: for answers of one token."
    ),
]
KeyValues = Annotated[
    KV,
    typer.Option(
        "--kv",
        help="With --threshold: tokens that left catch up later (exact), or their state is copied.",
    ),
]


def read_prompt_options(prompt: str | None, file: Path | None, limit: int | None) -> list[Prompt]:
    """Return the prompts that --prompt or --prompts name; an empty list for neither."""
    from offramp.text import read_prompts

    if prompt is not None and file is not None:
        raise UsageError("--prompt and --prompts exclude each other")
    if file is not None:
        return read_prompts(file, limit)
    if prompt is None:
        return []
    text = _piped() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty")
    return [text]


def _piped() -> str:
    try:
        return typer.get_binary_stream("stdin").read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on stdin is not UTF-8: {error.reason}") from error


def parse_plan(
    plan: str | None,
    *,
    draft: int | None = None,
    adapt: str | None = None,
    draft_tokens: int = 4,
    draft_confidence: float = 0.0,
    exit_depth: int | None = None,
    head: str | None = None,
    threshold: str | None = None,
    check: str | None = None,
    classifier: Path | None = None,
    skip: Path | None = None,
    exit_prompt: bool = False,
    kv: KV = KV.exact,
) -> Plan:
    """Return the plan that the options describe; at most one way of describing it is allowed.

    Raises:
        UsageError: two ways at once, or a threshold or check that cannot be read.
        OfframpError: the plan file, the gates or the classifier cannot be read.
    """
    from offramp.checks import parse_check, parse_head
    from offramp.paths import prefix
    from offramp.plan import Plan, read_plan
    from offramp.runs import Adapt, Exit, Skip, Speculate
    from offramp.runs import Path as SubModel

    if classifier is not None:
        learnt = _learnt(classifier)
        threshold, check = threshold or learnt[0], check or learnt[1]
    given = {
        "--plan": plan,
        "--draft": draft,
        "--adapt": adapt,
        "--exit": exit_depth,
        "--skip": skip,
        "--threshold": threshold,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other")
    if check is not None and threshold is None:
        raise UsageError("--check says what a --threshold looks at; give one")
    if exit_prompt and threshold is None:
        raise UsageError("--exit-prompt goes with --threshold or --classifier; give one")
    if head is not None and (named in ([], ["--plan"], ["--skip"])):
        raise UsageError(
            "--head says what chooses the tokens of --exit, --threshold, --draft or --adapt; give "
            "one"
        )
    chooses = parse_head(head or "full")
    if draft is not None:
        if draft < 1:
            raise UsageError(f"--draft {draft}: a draft runs 1 layer or more")
        layers = tuple(range(draft))
        return Plan(
            run=Speculate(
                draft=layers, tokens=draft_tokens, min_confidence=draft_confidence, head=chooses
            )
        )
    if adapt is not None:
        drafts = tuple(tuple(range(depth)) for depth in parse_counts("--adapt", adapt))
        return Plan(
            run=Adapt(
                drafts=drafts, tokens=draft_tokens, min_confidence=draft_confidence, head=chooses
            )
        )
    if skip is not None:
        skipping = Skip(gates=str(skip))
        _ = skipping.weights  # refuses a file that is none before a model loads
        return Plan(run=skipping)
    if exit_depth is not None:
        layers = prefix(exit_depth, max(exit_depth, 1))
        return Plan(run=SubModel(layers=layers, head=chooses))
    if threshold is not None:
        signal, values = parse_threshold(threshold)
        looked_at = parse_check(check or "full")
        run = Exit(
            signal=signal,
            thresholds=values,
            kv=kv.value,
            exit_prompt=exit_prompt,
            check=looked_at,
            classifier=None if classifier is None else str(classifier),
            head=chooses,
        )
        _ = run.policy  # refuses an unknown signal or a value out of range before a model loads
        return Plan(run=run)
    return Plan() if plan is None or plan == "full" else read_plan(shipped.plan(plan))


def _learnt(file: Path) -> tuple[str, str | None]:
    """Return a classifier's own thresholds and check, as one would write them.

    A list of tokens, of which it knows the digest only, has to be given again.
    """
    from offramp.classifier import load_classifier

    facts = load_classifier(file).facts
    pairs = ",".join(f"{depth}:0" for depth in facts.exits)
    return f"classifier={pairs}", None if facts.check.startswith("tokens:") else facts.check


def parse_threshold(text: str) -> tuple[str, dict[int, float]]:
    """Return (signal, thresholds by depth) of ``SIGNAL=DEPTH:VALUE,...``."""
    signal, _, pairs = text.partition("=")
    try:
        split = [pair.split(":") for pair in pairs.split(",")]
        values = {int(depth): float(value) for depth, value in split}
    except ValueError:
        values = {}
    if not signal or not values or len(values) != pairs.count(",") + 1:
        raise UsageError(
            f"--threshold {text!r}: write SIGNAL=DEPTH:VALUE,... with each depth once, "
            "e.g. max_prob=12:0.95,18:0.9"
        )
    if any(value != value or abs(value) == float("inf") for value in values.values()):
        raise UsageError(f"--threshold {text!r}: thresholds are finite numbers")
    return signal, values


def parse_depths(text: str | None) -> tuple[int, ...] | None:
    """Return the depths of a list such as ``6,12,18``, or None for None."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--exits {text!r}: write depths with commas, e.g. 6,12,18") from error


def parse_counts(option: str, text: str) -> list[int]:
    """Return the numbers of a list such as ``1,4,16``, each 1 or more and once."""
    parts = text.split(",")
    counts = [int(part) for part in parts if part.strip().isdecimal()]
    if len(counts) < len(parts) or min(counts) < 1 or len(set(counts)) < len(counts):
        raise UsageError(f"{option} {text!r}: write different numbers with commas, e.g. 1,4,16")
    return counts


def parse_choices(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the words of a list such as ``int4,int8``, each known and once."""
    words = text.split(",")
    if not set(words) <= set(known) or len(set(words)) < len(words):
        raise UsageError(f"{option} {text!r}: write different words of {', '.join(known)}")
    return words
