"""Runs one other engine in a process of its own: one JSON line per order on stdin, one per answer.

Started by path, with the interpreter of another environment: imports nothing of offramp. Times
are taken here, around the engine alone. Between orders the process sleeps on stdin.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

Texts = list[list[int]]
Order = dict[str, Any]


class Watch:
    """Told after a step how many tokens each text has; notes when the first came."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.tokens = 0

    def __call__(self, tokens: int = 1) -> bool:
        """Return False: go on."""
        if self.first is None:
            self.first, self.tokens = time.perf_counter(), tokens
        return False


class HuggingFace:
    """``generate`` of the untouched model, greedy, ended by nothing but the number of tokens."""

    package, weights = "transformers", "fp32"
    note = "generate(), greedy, eager"

    def __init__(self, order: Order) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(order["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(
            order["model"], dtype=torch.float32, trust_remote_code=order["trust_remote_code"]
        ).eval()
        self.bytes: int | None = sum(p.nbytes for p in self.model.parameters())
        self.options: Order = {}

    def write(self, prompts: Texts, tokens: int, watch: Watch) -> Texts:
        """Return each text's new tokens."""
        import torch

        ids, length = torch.tensor(prompts), len(prompts[0])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            eos_token_id=None,  # an end token is a token like any other here
            pad_token_id=0,
            do_sample=False,
            repetition_penalty=1.0,
            stopping_criteria=[lambda so_far, *_, **__: watch(so_far.shape[1] - length)],
            **self.options,
        )
        texts: Texts = out[:, length:].tolist()
        return texts


def drafting_depth(order: Order, model: Any) -> int:
    """Return the depth asked for, or two thirds of the layers."""
    return int(order["exit"] or max(1, round(2 / 3 * model.config.num_hidden_layers)))


class EarlyExit(HuggingFace):
    """Self-speculation as Hugging Face has it."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self.bytes = None  # how often it reads them depends on its drafts
        depth = drafting_depth(order, self.model)
        self.options = {"assistant_early_exit": depth}
        self.note = f"generate(assistant_early_exit={depth}); prefill includes a draft"


class Economize:
    """Lossless self-speculation of the package economize."""

    package, weights, bytes = "economize", "fp32", None

    def __init__(self, order: Order) -> None:
        import economize
        from economize.techniques.early_exit import EarlyExitConfig

        base = HuggingFace(order).model
        depth = drafting_depth(order, base)
        self.model = economize.apply(base, EarlyExitConfig(exit_layer=depth, head="shared"))
        self.note = f"decode_batch(), lossless early exit at {depth}, cycles of 4"

    def write(self, prompts: Texts, tokens: int, watch: Watch) -> Texts:
        """Return each text's new tokens."""
        import torch

        done = self.model.decode_batch(torch.tensor(prompts), tokens, stop=lambda _: watch())
        return [result.tokens.tolist() for result in done]


class LlamaCpp:
    """llama.cpp on the very GGUF file, by its low-level loop: no sampler of Python's is in it."""

    package = "llama_cpp_python"
    note = "eval() of the prompt in batches of 512, then eval() and argmax token by token"

    def __init__(self, order: Order) -> None:
        import llama_cpp

        if order["gguf"] is None:
            raise ValueError("it reads GGUF files, and this model is none")
        file = Path(order["gguf"])
        kind = re.search("bf16|f32|q4|q8", file.name.lower())
        formats = {"bf16": "bf16", "f32": "fp32", "q4": "int4", "q8": "int8"}
        self.weights = formats[kind[0]] if kind else None
        self.bytes: int | None = file.stat().st_size
        threads = {"n_threads": order["threads"], "n_threads_batch": order["threads"]}
        self.model = llama_cpp.Llama(
            str(file), n_ctx=order["context"], n_batch=512, verbose=False, **threads
        )

    def write(self, prompts: Texts, tokens: int, watch: Watch) -> Texts:
        """Return the text's new tokens."""
        if len(prompts) > 1:
            raise ValueError("it is timed on one text at a time")
        self.model.reset()
        new = [self._next(prompts[0])]
        watch()
        while len(new) < tokens:
            new.append(self._next(new[-1:]))
        return [new]

    def _next(self, ids: list[int]) -> int:
        import numpy as np

        self.model.eval(ids)
        logits = self.model._ctx.get_logits()  # of the last row, the only one that has any
        return int(np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).argmax())


class CTranslate2:
    """CTranslate2 on the same fp32 weights, converted into the folder this process runs in."""

    package, weights = "ctranslate2", "fp32"
    note = "generate_batch(), greedy, float32"

    def __init__(self, order: Order) -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(order["model"])
        self.pieces: list[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        converted = TransformersConverter(order["model"]).convert("converted")
        self.bytes: int | None = Path(converted, "model.bin").stat().st_size
        threads = order["threads"]
        self.model = ctranslate2.Generator(converted, compute_type="float32", intra_threads=threads)

    def write(self, prompts: Texts, tokens: int, watch: Watch) -> Texts:
        """Return each text's new tokens."""
        done = self.model.generate_batch(
            [[self.pieces[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            end_token=[len(self.pieces) - 1],  # some token must end texts: take the rarest
            include_prompt_in_result=False,
            callback=lambda _: watch(),
        )
        return [list(result.sequences_ids[0]) for result in done]


ENGINES: dict[str, type[Any]] = {
    "hf": HuggingFace,
    "hf-early-exit": EarlyExit,
    "llama.cpp": LlamaCpp,
    "economize": Economize,
    "ctranslate2": CTranslate2,
}


def run(engine: Any, prompts: Texts, tokens: int) -> Order:
    """Return seconds to the first tokens, seconds after, tokens that came after, and all tokens."""
    watch = Watch()
    start = time.perf_counter()
    outputs = engine.write(prompts, tokens, watch)
    done, first = time.perf_counter(), watch.first
    assert first is not None, "it wrote nothing"
    late = sum(map(len, outputs)) - len(prompts) * watch.tokens
    return {"prefill": first - start, "decode": done - first, "decoded": late, "outputs": outputs}


def main() -> None:
    """Open an engine by the first order, run it by every other one, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an engine prints must not look like an answer
    engine: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if engine is None:
                engine = ENGINES[order["engine"]](order)
                facts = {name: getattr(engine, name) for name in ("weights", "bytes", "note")}
                answer = {"version": importlib.metadata.version(engine.package), **facts}
            else:
                answer = run(engine, order["prompts"], order["tokens"])
        except ImportError as error:
            answer = {"missing": str(error)}
        except Exception as error:  # an engine may raise anything; it becomes the row's reason
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
