"""`qwen-jax chat`: a conversation in the terminal."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from . import common
from .common import Typewriter, print_json

EXAMPLES = """
qwen-jax chat ./Qwen-7B-Chat-Int4
qwen-jax chat ./Qwen-7B-Chat-Int4 --kv8 --system "Answer in one sentence."
qwen-jax chat Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4 --temperature 0 --max-length 8192
echo "What is JAX?" | qwen-jax chat ./Qwen-7B-Chat-Int4 --json
"""


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
    adapter: common.Adapter = None,
    markdown: Annotated[bool, typer.Option("--markdown/--plain", help="Draw answers as Markdown.")] = True,
    json: common.Json = False,
    debug: common.Debug = False,
):
    """Talk with a model; without a terminal, each line of standard input is a question.

    On a terminal Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer and Ctrl-D leaves; /help lists the
    commands (/system, /retry, /undo, /save, /load, /clear, /quit), which piped lines may use too.
    """
    from .chat_session import Session

    language_model, tokenizer = common.load(
        model,
        use_cache_quantization=kv8,
        dtype=dtype,
        kernels=kernels,
        max_length=max_length,
        lm_head=lm_head,
        adapter=adapter,
    )
    settings = common.sampling_arguments(temperature, top_p, top_k, repetition_penalty)
    session = Session(language_model, tokenizer, settings | {"max_new_tokens": max_new_tokens}, system, seed)
    if not json and sys.stdin.isatty() and sys.stdout.isatty():
        from .chat_terminal import talk

        talk(session, model, markdown=markdown)
    else:
        _piped(session, json)


def _piped(session, json: bool) -> None:
    """Answers each line of standard input; what commands have to say goes to standard error."""
    for question in _questions():
        if question.startswith("/"):
            message, again = session.command(question)
            if message:
                print(message, file=sys.stderr)
            if session.finished:
                return
            if again is None:
                continue
            question = again
        typewriter = Typewriter(None if json else sys.stdout)
        for text in session.ask(question):
            typewriter(text)
        answer = typewriter.end()
        if json:
            print_json({"question": question, "answer": answer})


def _questions() -> Iterator[str]:
    """Lines that are not empty; a backslash at the end of one joins the next to it."""
    lines: list[str] = []
    for line in sys.stdin:
        text = line.rstrip("\n")
        if text.endswith("\\"):
            lines.append(text[:-1])
            continue
        if question := "\n".join([*lines, text]).strip():
            yield question
        lines = []
    if question := "\n".join(lines).strip():
        yield question
