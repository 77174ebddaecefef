"""`qwen-jax generate`: continues a text."""

import contextlib
import sys
import time
from typing import Annotated

import typer

from . import common
from .common import Typewriter, print_json, sampling_arguments

EXAMPLES = """
qwen-jax generate ./Qwen2.5-7B-GPTQ-Int4 "def fibonacci(n):" --temperature 0 --max-new-tokens 64
echo "Once upon a time" | qwen-jax generate ./Qwen2.5-7B-GPTQ-Int4 - --json
qwen-jax generate ./Qwen2.5-72B-GPTQ-Int4 "Once upon a time" --mesh 1x4
srun --nodes 2 --ntasks-per-node 8 qwen-jax generate ./Qwen2.5-72B-GPTQ-Int4 "Once upon a time" --distributed
"""


def run(
    model: common.Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: common.MaxNewTokens = 256,
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
    mesh: Annotated[
        str | None,
        typer.Option(help="Devices for rows x each layer (x the cache's length), as 1x4.", metavar="DxM[xS]"),
    ] = None,
    reproducible: Annotated[
        bool, typer.Option("--reproducible", help="The same bits on one device and on every mesh; slower, float32.")
    ] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Run as one of many processes: Slurm, GKE, Cloud TPU, Open MPI.")
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="Of process 0, where JAX finds no cluster by itself.", metavar="HOST:PORT")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="Likewise.", min=1)] = None,
    process_id: Annotated[int | None, typer.Option(help="Likewise, of this process, from 0.", min=0)] = None,
    step_timeout: Annotated[
        int, typer.Option(help="Seconds after which processes give up waiting for one that is stuck.", min=1)
    ] = 600,
    json: common.Json = False,
    debug: common.Debug = False,
):
    """Continue a text, without a chat template."""
    from .. import distributed as processes
    from ..sharding import parse_mesh
    from ..text_stream import TextStream

    if prompt == "-":
        if distributed:
            raise ValueError("PROMPT: - reads standard input, which not every process has. Give the text itself.")
        prompt = sys.stdin.read().rstrip("\n")
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    if not distributed and (named := [f"--{name}" for name, value in given.items() if value is not None]):
        raise ValueError(f"{named[0]}: goes with --distributed. Add that, or leave it out.")
    together = contextlib.nullcontext()
    if distributed:
        processes.start(coordinator, num_processes, process_id, timeout=step_timeout)
        together = processes.command()
        import jax

        mesh = mesh or f"1x{jax.device_count()}"
    with together:
        language_model, tokenizer = common.load(
            model,
            use_cache_quantization=kv8,
            dtype=dtype,
            kernels=kernels,
            max_length=max_length,
            lm_head=lm_head,
            adapter=adapter,
            mesh=None if mesh is None else parse_mesh(mesh),
            reproducible=reproducible,
        )
        ids = tokenizer.encode(prompt)
        if not ids:
            raise ValueError("PROMPT: is empty, expected at least one character. Give a text to continue.")
        text, typewriter = TextStream(tokenizer), Typewriter(None if json else sys.stdout)
        start, tokens = time.perf_counter(), 0
        settings = sampling_arguments(temperature, top_p, top_k, repetition_penalty)
        chunks = language_model.stream([ids], max_new_tokens=max_new_tokens, seed=seed, **settings)
        for chunk in common.first_awaited(chunks, "Compiling and reading the prompt"):
            new = chunk.tokens_BN[0][chunk.kept_BN[0]].tolist()
            if not tokens and not json:
                sys.stdout.write(prompt)
            tokens += len(new)
            typewriter(text.push(new))
        typewriter(text.finish())
        typewriter.end()
        if json:
            seconds = round(time.perf_counter() - start, 3)
            print_json({"prompt": prompt, "text": text.text, "new_tokens": tokens, "seconds": seconds})
