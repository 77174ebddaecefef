"""Options that several commands share, and how their results and errors are printed."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from ..causal_lm import QwenForCausalLM
    from ..tokenizer import Tokenizer
    from .progress import Update


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]  # acted on in cli.main
Model = Annotated[str, typer.Argument(help="A folder (Hugging Face or converted) or a Hub id.", metavar="MODEL")]
Dtype = Annotated[str, typer.Option(help="Of activations: auto, float32, bfloat16 or float16.", metavar="DTYPE")]
Kernels = Annotated[str, typer.Option(help="auto, or one for all operations: xla, mosaic_gpu, …", metavar="NAME")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens the KV cache holds (prompt and answer).", min=1)]
Kv8 = Annotated[bool, typer.Option("--kv8/--kv16", help="Keep the KV cache in 8 or in 16 (on CPU 32) bits.")]
Adapter = Annotated[Path | None, typer.Option(help="A LoRA adapter to run beside the weights.", metavar="FOLDER")]
LmHead = Annotated[str | None, typer.Option(help="int8: round the output head to 8 bits.", metavar="int8")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]
Temperature = Annotated[float | None, typer.Option(help="Of sampling; 0 takes the most probable token.")]
TopP = Annotated[float | None, typer.Option(help="Sample among tokens of this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample among this many tokens; 0 for all.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 avoids tokens that came before.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers; the same seed gives the same text.")]


def load(name: str | Path, **settings: Any) -> tuple["QwenForCausalLM", "Tokenizer"]:
    """Model and tokenizer, with the persistent compilation cache switched on; arguments as `from_pretrained`."""
    from .. import AutoTokenizer, QwenForCausalLM, compilation_cache
    from ..checkpoint_store import find
    from .progress import BYTES

    compilation_cache.enable()
    folder = find(name)
    with status(f"Loading {folder.name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with progress_bars() as update:

        def progress(done: int, total: int) -> None:
            update(f"Loading {folder.name}", done, total, unit=BYTES)

        return QwenForCausalLM.from_pretrained(folder, progress=progress, **settings), tokenizer


def is_converted(folder: Path) -> bool:
    """Whether `qwen-jax convert` wrote this folder."""
    from converters import orbax

    return orbax.is_checkpoint(folder)


def status(text: str) -> contextlib.AbstractContextManager[None]:
    """See `progress.status`; imported when used, for a quick --help."""
    from . import progress

    return progress.status(text)


def first_awaited[T](parts: Iterable[T], text: str) -> Iterator[T]:
    """The parts; a spinner with `text` turns until the first is there, which may take a compilation."""
    iterator = iter(parts)
    with status(text):
        first = next(iterator, None)
    if first is not None:
        yield first
        yield from iterator


def progress_bars(announce: bool = False) -> contextlib.AbstractContextManager["Update"]:
    """See `progress.progress_bars`; imported when used, for a quick --help."""
    from . import progress

    return progress.progress_bars(announce)


def sampling_arguments(
    temperature: float | None, top_p: float | None, top_k: int | None, repetition_penalty: float | None
) -> dict[str, Any]:
    """Arguments for `generate` and `chat`, of the options that were given; a temperature of 0 means greedy."""
    given: dict[str, Any] = {"top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
    if temperature is not None:
        given |= {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    return {name: value for name, value in given.items() if value is not None}


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on one line of standard output."""
    print(json.dumps(result, ensure_ascii=False), flush=True)


class Typewriter:
    """Prints a text that grows: each call gets the whole text so far and writes what is new (nowhere: stream None)."""

    def __init__(self, stream: TextIO | None = sys.stdout):
        self.stream, self.text = stream, ""

    def __call__(self, text: str) -> None:
        if self.stream:
            self.stream.write(text[len(self.text) :])
            self.stream.flush()
        self.text = text

    def end(self) -> str:
        """Ends the line and returns the whole text."""
        if self.stream:
            self.stream.write("\n")
            self.stream.flush()
        return self.text
