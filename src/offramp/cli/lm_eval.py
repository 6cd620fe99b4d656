"""``offramp-lm-eval``: the lm-evaluation-harness's own command line, with the model ``offramp``."""

from __future__ import annotations

from offramp.cli import end
from offramp.errors import OfframpError, UsageError


def main() -> None:
    """Make the model known to the harness, by name alone, and hand over to its command line.

    The harness looks for models in no plug-ins, so that ``lm_eval`` itself cannot know it. Torch is
    loaded when the model is asked for.
    """
    try:
        import lm_eval.models  # noqa: F401  (its own models register only where there are none)
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError:
        end(1, "the lm-evaluation-harness is not installed: pip install 'offramp[harness]'")
    if "offramp" not in model_registry:
        model_registry.register("offramp", target="offramp.harness.lm:OfframpLM")
    try:
        cli_evaluate()
    except OfframpError as error:
        end(2 if isinstance(error, UsageError) else 1, str(error))
