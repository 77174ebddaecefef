"""`qwen-jax bench`: speed and memory at the true dimensions of a model, with random weights; no checkpoint needed."""

import os
from typing import Annotated, Any

import typer

from . import bench_kernels
from .bench_output import Batch, Bits, Context, Dtype, KvBits, Output, check_values, examples, finish, resolve
from .common import Debug, Json, Kernels, progress_bars, status

EXAMPLES = """
qwen-jax bench decode --model qwen-7b --bits 4 --kv-bits 8 --batch 1 --context 2048
qwen-jax bench decode --model qwen-1.8b --batch 1 --batch 8 --batch 32 --output decode.json
qwen-jax bench decode --model qwen-7b --lm-head int8 --no-one-launch
qwen-jax bench decode --model qwen-72b --mesh 1x2 --check
qwen-jax bench prefill --model qwen2.5-7b --context 2048
qwen-jax bench memory --model qwen-7b --bits 4 --bits 16 --context 2048
qwen-jax bench matmul --rows 1 --rows 16 --rows 64 --output matmul.json
qwen-jax bench matmul --model qwen-7b --bits 8 --kernels xla
qwen-jax bench attention --model qwen-7b --batch 8 --context 2048
qwen-jax bench tune --shape 4096x11008 --rows 1 --rows 16
qwen-jax bench tune --operation attention --model qwen-7b --batch 8
qwen-jax bench report matmul.json decode.json --output report
"""

run = typer.Typer(no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Dimensions: qwen-1.8b, qwen-7b, qwen2.5-7b, qwen3-8b, …")]
Models = Annotated[list[str], typer.Option(help="Dimensions, as qwen-7b; may be given several times.")]
Layers = Annotated[int | None, typer.Option(help="Only so many layers, for a quick look.", min=1)]
Mesh = Annotated[
    str | None, typer.Option(help="Devices for rows x each layer (x the cache's length), as 1x2.", metavar="DxM[xS]")
]
Check = Annotated[bool, typer.Option("--check", help="With --mesh: also time one device, and compare greedy tokens.")]
OneLaunch = Annotated[
    bool,
    typer.Option("--one-launch/--no-one-launch", help="All layers of a step in one launch, where it can (Hopper)."),
]
LmHead = Annotated[str | None, typer.Option(help="int8: an output head of 8 bits.", metavar="int8")]
Rounds = Annotated[int, typer.Option(help="Timed repetitions, after a warm-up.", min=1)]


@run.callback()
def _bench(debug: Debug = False):
    """Measure speed and memory at a model's dimensions, with random weights: no checkpoint needed."""


@run.command(epilog=examples(EXAMPLES, "decode"))
def decode(
    model: Model = "qwen-7b",
    bits: Bits = [4],  # noqa: B006
    kv_bits: KvBits = [8],  # noqa: B006
    batch: Batch = [1],  # noqa: B006
    context: Context = [2048],  # noqa: B006
    layers: Layers = None,
    mesh: Mesh = None,
    check: Check = False,
    one_launch: OneLaunch = True,
    lm_head: LmHead = None,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    rounds: Rounds = 5,
    output: Output = None,
    json: Json = False,
    debug: Debug = False,
):
    """Time whole decode steps, beside the bytes that they must read and a copy's rate in the same run."""
    _model(
        *("decode", model, bits, kv_bits, batch, context, layers, mesh, check, dtype, kernels, rounds, output, json),
        options=dict(one_launch=one_launch, lm_head=lm_head),
    )


@run.command(epilog=examples(EXAMPLES, "prefill"))
def prefill(
    model: Model = "qwen-7b",
    bits: Bits = [4],  # noqa: B006
    kv_bits: KvBits = [8],  # noqa: B006
    batch: Batch = [1],  # noqa: B006
    context: Context = [2048],  # noqa: B006
    layers: Layers = None,
    mesh: Mesh = None,
    check: Check = False,
    lm_head: LmHead = None,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    rounds: Rounds = 5,
    output: Output = None,
    json: Json = False,
    debug: Debug = False,
):
    """Time the reading of whole prompts."""
    _model(
        *("prefill", model, bits, kv_bits, batch, context, layers, mesh, check, dtype, kernels, rounds, output, json),
        options=dict(lm_head=lm_head),
    )


@run.command(epilog=examples(EXAMPLES, "memory"))
def memory(
    model: Models = ["qwen-7b"],  # noqa: B006
    bits: Bits = [4],  # noqa: B006
    kv_bits: KvBits = [8],  # noqa: B006
    batch: Batch = [1],  # noqa: B006
    context: Context = [2048],  # noqa: B006
    layers: Layers = None,
    one_launch: OneLaunch = True,
    lm_head: LmHead = None,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    output: Output = None,
    json: Json = False,
    debug: Debug = False,
):
    """Device memory at its peak, reading a prompt and decoding up to --context: weights, cache and temporaries."""
    from ..bench import memory, processes

    _check_model(model, bits, kv_bits, lm_head)
    processes.leave_memory()
    options: dict[str, Any] = dict(layers=layers, dtype=resolve(dtype), kernels=kernels)
    options |= dict(one_launch=one_launch, lm_head=lm_head)
    cases = [(name, case) for name in model for each in bits for case in _cases(each, kv_bits, batch, context)]
    results = []
    with progress_bars() as update:
        for number, (name, case) in enumerate(cases):
            update("Measuring memory", number, len(cases), unit="cases", note=name)
            results.append(memory.measure(name, **case, **options))
            update("Measuring memory", number + 1, len(cases), unit="cases")
    finish("memory", results, None, output, json)


run.command(epilog=examples(EXAMPLES, "matmul"))(bench_kernels.matmul)
run.command(epilog=examples(EXAMPLES, "attention"))(bench_kernels.attention)
run.command(epilog=examples(EXAMPLES, "tune"))(bench_kernels.tune)
run.command(epilog=examples(EXAMPLES, "report"))(bench_kernels.report)


def _check_model(models, bits, kv_bits, lm_head) -> None:
    from ..bench.models import MODELS

    check_values("model", models, list(MODELS))
    check_values("bits", bits, [4, 8, 16])
    check_values("kv-bits", kv_bits, [8, 16])
    check_values("lm-head", [lm_head], [None, "int8"])


def _cases(bits: int, kv_bits, batch, context) -> list[dict[str, int]]:
    """Of weights of so many bits: every cache, number of rows and length."""
    return [
        {"bits": bits, "kv_bits": cache_bits, "batch": rows, "context": length}
        for cache_bits in kv_bits
        for rows in batch
        for length in context
    ]


def _model(
    what, model, bits, kv_bits, batch, context, layers, mesh, check, dtype, kernels, rounds, output, json, *, options
) -> None:
    """`decode` and `prefill`: a model for each number of bits, then every case."""
    import dataclasses

    from jax.errors import JaxRuntimeError

    from ..bench import decode, floors, one_device, prefill, timing
    from ..sharding import parse_mesh

    module = {"decode": decode, "prefill": prefill}[what]
    _check_model([model], bits, kv_bits, options["lm_head"])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".93")  # of a GPU; read when JAX first asks for it
    dtype = resolve(dtype)
    if check and mesh is None:
        raise ValueError("--check: goes with --mesh, which it compares with one device. Give --mesh, as 1x2.")
    devices = None if mesh is None else parse_mesh(mesh)
    results: list[dict[str, Any]] = []
    for weight_bits in bits:
        with status(f"Making random weights of {model}"):
            decoder = decode.build(
                model, bits=weight_bits, dtype=dtype, kernels=kernels, layers=layers, mesh=devices, **options
            )
        cases = _cases(weight_bits, kv_bits, batch, context)
        tokens: dict[tuple[int, int], Any] = {}
        with progress_bars() as update:
            for number, case in enumerate(cases):
                rows, length = case["batch"], case["context"]
                where = f"batch {rows}, context {length}, {case['kv_bits']}-bit cache"
                update(f"Measuring {what}", number, len(cases), unit="cases", note=where)
                try:
                    result = module.measure(model, decoder, **case, rounds=rounds, mesh=devices)
                    results.append({**dataclasses.asdict(result), "layers": decoder.config.num_layers})
                    if check:
                        programs = decode.programs_of(decoder, devices)
                        tokens[case["kv_bits"], rows] = one_device.greedy(programs, dtype, case["kv_bits"], rows)
                        del programs
                except JaxRuntimeError as error:  # usually out of memory; the other cases still run
                    results.append({"model": model, **case, "failed": str(error).splitlines()[0][:200]})
                update(f"Measuring {what}", number + 1, len(cases), unit="cases")
        del decoder
        if not check:
            continue
        with status(f"Making the same model on one device, and measuring {what}"):
            alone = decode.build(model, bits=weight_bits, dtype=dtype, kernels=kernels, layers=layers, as_on_mesh=True)
            programs = decode.programs_of(alone)
            for case, record in zip(cases, results[-len(cases) :], strict=True):
                if "failed" in record:
                    continue
                try:
                    one = dataclasses.asdict(module.measure(model, alone, **case, rounds=rounds))
                    want = one_device.greedy(programs, dtype, case["kv_bits"], case["batch"])
                except JaxRuntimeError as error:
                    record["one_device_failed"] = str(error).splitlines()[0][:200]
                    continue
                got = tokens[case["kv_bits"], case["batch"]]
                record |= one_device.compare(record, one, want, got)
        del alone, programs
    with status("Measuring a copy"):  # last, so that its arrays are in no peak
        copy = timing.copy_bandwidth(None if dtype == "bfloat16" else 128) / 1e9
    for result in results:
        floors.add(what, result, copy)
        if options["lm_head"] is not None:
            result["lm_head"] = options["lm_head"]
    finish(what, results, copy, output, json)
