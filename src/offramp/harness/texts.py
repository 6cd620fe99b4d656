"""What the harness asks of a model's tokenizer: ids, chat templates, names for its caches."""

from __future__ import annotations

import logging

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM

from offramp.errors import UsageError
from offramp.model import Model

_log = logging.getLogger("lm_eval.offramp")  # the harness shows what its own loggers say


class Texts(TemplateLM):  # type: ignore[misc]
    """What knows texts; who inherits it sets ``model``, and its ``tokenizer``."""

    model: Model

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return min(self.model.eos) if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text that nothing is given for."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Return what the harness names its cache of requests by."""
        return str(self.tokenizer.name_or_path or self.model.name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Return token ids; a text that begins with the begin token gets no second one."""
        if add_special_tokens is None:
            begin: str | None = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as one text; without the system's, where the template has no place.

        Raises:
            UsageError: the model has no chat template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(f"{self.model.name} has no chat template; leave it out")
        try:
            return self._templated(chat_history, add_generation_prompt)
        except TemplateError:  # the harness's own models do so, and figures must compare
            _log.warning("the chat template has no place for a system message: leaving it out")
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return self._templated(others, add_generation_prompt)
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses this prompt: {error}") from error

    def _templated(self, messages: list[dict[str, str]], answer_next: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=answer_next,
            continue_final_message=not answer_next,
        )
        return text
