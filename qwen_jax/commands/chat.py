"""`qwen-jax chat`: a conversation in the terminal."""

import contextlib
import sys
from typing import Annotated

import typer

from . import common
from .common import Typewriter, print_json

EXAMPLES = """
qwen-jax chat ./Qwen-7B-Chat-Int4
qwen-jax chat ./Qwen-7B-Chat-Int4 --kv8 --system "Answer in one sentence."
echo "What is JAX?" | qwen-jax chat ./Qwen-7B-Chat-Int4 --json
"""
HELP = "Commands: /reset forgets the conversation, /exit (or Ctrl-D) ends it; Ctrl-C stops an answer."


def run(
    model: common.Model,
    system: Annotated[str | None, typer.Option(help="System text; default: the model's own.")] = None,
    max_new_tokens: common.MaxNewTokens = 1024,
    temperature: common.Temperature = None,
    top_p: common.TopP = None,
    top_k: common.TopK = None,
    repetition_penalty: common.RepetitionPenalty = None,
    seed: common.Seed = 0,
    kv8: common.Kv8 = False,
    dtype: common.Dtype = "auto",
    kernels: common.Kernels = "auto",
    max_length: common.MaxLength = None,
    lm_head: common.LmHead = None,
    json: common.Json = False,
    debug: common.Debug = False,
):
    """Talk with a model; without a terminal, each line of standard input is a question."""
    language_model, tokenizer = common.load(
        model, use_cache_quantization=kv8, dtype=dtype, kernels=kernels, max_length=max_length, lm_head=lm_head
    )
    settings = common.sampling_arguments(temperature, top_p, top_k, repetition_penalty)
    interactive = sys.stdin.isatty() and not json
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and recall in input())
        print(HELP)
    history: list = []
    for question in _questions(interactive):
        if question == "/reset":
            history = []
            continue
        stream = language_model.chat_stream(
            tokenizer, question, history, system, max_new_tokens=max_new_tokens, seed=seed + len(history), **settings
        )
        typewriter = Typewriter(None if json else sys.stdout)
        try:
            for text in stream:
                typewriter(text)
        except KeyboardInterrupt:
            if not interactive:
                raise
        answer = typewriter.end()
        history = [*history, (question, answer)]
        if json:
            print_json({"question": question, "answer": answer})


def _questions(interactive: bool):
    """Lines that are not empty, until the end of input or /exit."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line == "/exit":
            return
        if line == "/help":
            print(HELP)
        elif line:
            yield line
