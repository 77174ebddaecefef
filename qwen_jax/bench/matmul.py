"""Speed of the quantized matmul at true dimensions, with random weights made on the device.

Median µs a call: one jitted chain of calls, each waiting for the one before, over rotating weights of more than 256 MB
(so that a GPU's L2 helps nobody), the host's share cancelled. Shapes compile in parallel, each in a process of its own,
and are timed one after another. The floor is the longer of two times: the bytes of packed weights and scales at the
rate of a copy measured in the same run, and the operations at the data sheet's rate.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu, op
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from qwen_jax.bench import timing
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_weights import quantized
from qwen_jax.plan.chips import CHIPS

SHAPES = ((4096, 11008), (4096, 12288), (11008, 4096), (2048, 5504), (8192, 24576))
ROWS = (1, 4, 8, 16, 32, 64, 256, 2048)
ROTATE_BYTES = 280e6
CHECKED_ROWS = 16

type Tilings = Mapping[tuple[int, int, int], Mapping[int, Sequence[Sequence]]]  # (bits, in, out) → rows → tilings


def model_shapes(name: str) -> tuple[tuple[int, int], ...]:
    """(in, out) of a model's four matmuls: query, key and value in one; output; gate and up in one; down."""
    config = MODELS[name]
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return (hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 2 * inner), (inner, hidden)


def parse_shape(text: str) -> tuple[int, int]:
    """(in, out) of `4096x11008`."""
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"--shapes {text}: expected in x out, as 4096x11008.")
    return int(sizes[0]), int(sizes[1])


def measure(
    shapes: Sequence[tuple[int, int]],
    *,
    rows: Sequence[int] = ROWS,
    bits: Sequence[int] = (4,),
    group_size: int = 128,
    tilings: Tilings | None = None,
    rotate_bytes: float = ROTATE_BYTES,
    patience: float = 120,
) -> tuple[float, list[dict[str, Any]]]:
    """A copy's GB/s and one record for each shape, number of bits and rows (and tiling tried).

    Args:
        shapes: (in, out).
        rows: of the activations.
        bits: 4 or 8.
        group_size: inputs a scale; -1 for all.
        tilings: to try besides the chosen one, on a Hopper GPU.
        rotate_bytes: size of all the rotating weights together.
        patience: seconds that processes wait for each other before the first is timed.
    """
    jobs = [
        {
            "in": inputs,
            "out": outputs,
            "bits": width,
            "group_size": inputs if group_size == -1 else group_size,
            "rows": list(rows),
            "tilings": {
                str(count): extra for count, extra in (tilings or {}).get((width, inputs, outputs), {}).items()
            },
            "rotate_bytes": rotate_bytes,
            "copy": False,
        }
        for width in bits
        for inputs, outputs in shapes
    ]
    jobs[0]["copy"] = True
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            job |= {"folder": folder, "workers": len(jobs), "patience": patience}
        records = list(_job(jobs[0])) if len(jobs) == 1 else _in_processes(jobs)
    copy = next((record["copy"] for record in records if "copy" in record), None)
    if copy is None:
        raise RuntimeError(f"No process measured anything: {records[0]['failed']}")
    records = [record for record in records if "copy" not in record]
    for record in records:
        if "us" in record:
            floor = max(record["bytes"] / copy / 1e3, record.pop("operations_us"))
            speed = record["bytes"] / record["us"] / 1e3
            record |= {"floor_us": round(floor, 3), "of_floor": floor / record["us"]}
            record |= {"gigabytes_per_second": speed, "of_copy": speed / copy}
    return copy, records


def _in_processes(jobs: Sequence[dict]) -> list[dict[str, Any]]:
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "qwen_jax.bench.matmul", json.dumps(job)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    records = []
    try:
        for job, process in zip(jobs, processes, strict=True):
            output = process.communicate()[0]
            records += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            if process.returncode:
                records.append({**_about(job), "failed": f"its process ended with {process.returncode}"})
    finally:
        for process in processes:
            process.kill()
    return records


def _about(job: Mapping) -> dict[str, Any]:
    return {key: job[key] for key in ("in", "out", "bits", "group_size")}


@dataclasses.dataclass
class _Case:
    """One line of the table, compiled: `single` multiplies once, `chain` by all weights, `calls` times in all."""

    facts: dict[str, Any]
    single: Callable[..., jax.Array]
    chain: Callable[..., jax.Array]
    calls: int


def _job(job: Mapping) -> Iterator[dict[str, Any]]:
    """Compiles the calls of one shape, waits for the other processes, then times them."""
    chip = jax.devices()[0].device_kind
    make = functools.partial(_random_weight, job["in"], job["out"], job["bits"], job["group_size"], chip)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(_abstract(make)))
    count = max(4, int(job["rotate_bytes"] // size) + 1)
    cases = []
    for rows in job["rows"]:
        for multiply, facts in _forms(job, rows, chip):
            facts = _about(job) | {"rows": rows} | facts
            try:
                cases.append(_compile(facts, multiply, make, rows, count))
            except Exception as error:  # one that does not compile is reported, and the others still run
                yield facts | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    with _turn(job):
        if job["copy"]:
            yield {"copy": timing.copy_bandwidth() / 1e9}
        made = jax.jit(make)
        weights = [made(key) for key in jax.random.split(jax.random.key(1), count)]
        values_MI = jax.random.normal(jax.random.key(2), (max(CHECKED_ROWS, *job["rows"]), job["in"])) + 0.3
        values_MI = values_MI.astype(jnp.bfloat16)
        want_MO = _reference(values_MI[:CHECKED_ROWS], weights[0])
        for case in cases:
            rows, (few, many, repeats) = case.facts["rows"], (1, 4, 9)
            x_MI = values_MI[:rows]
            got_MO = np.asarray(case.single(x_MI, weights[0])[:CHECKED_ROWS], np.float64)
            error = np.linalg.norm(got_MO - want_MO[:rows]) / np.linalg.norm(want_MO[:rows])
            seconds = timing.seconds(functools.partial(case.chain, x_MI, weights), few, many, repeats) / case.calls
            yield case.facts | {
                "us": round(seconds * 1e6, 3),
                "bytes": int(_bytes(job)),
                "operations_us": 2.0 * rows * job["in"] * job["out"] / _peak(chip) * 1e6,
                "error": float(f"{error:.2e}"),
            }


def _abstract(make: Callable) -> QuantizedTensor:
    return jax.eval_shape(make, jax.random.key(0))


def _compile(facts: dict, multiply: Callable, make: Callable, rows: int, count: int) -> _Case:
    repeats = max(1, round((60 if rows < 512 else 6) / count)) if jax.default_backend() != "cpu" else 1
    abstract = _abstract(make)
    x_MI = jax.ShapeDtypeStruct((rows, facts["in"]), jnp.bfloat16)

    def chain(x_MI, weights):
        result = None
        for weight in list(weights) * repeats:
            result = multiply(x_MI, weight, result)
        return result

    single = jax.jit(lambda x_MI, weight: multiply(x_MI, weight, None)).lower(x_MI, abstract).compile()
    return _Case(facts, single, jax.jit(chain).lower(x_MI, [abstract] * count).compile(), count * repeats)


def _forms(job: Mapping, rows: int, chip: str) -> Iterator[tuple[Callable, dict[str, Any]]]:
    """What multiplies `rows` rows, and its name; on a Hopper GPU once for each tiling to try."""
    if not _hopper(chip):

        def multiply(x_MI, weight, after):
            if after is not None:
                x_MI, _ = jax.lax.optimization_barrier((x_MI, after))
            return op.quantized_matmul(x_MI, weight)

        shape = MatmulShape(rows, job["in"], job["out"], job["bits"], job["group_size"])
        yield multiply, {"kernel": op.choose(shape, chip).name}
        return
    from pallas_kernels.quantized_matmul import mosaic_gpu_large as large
    from pallas_kernels.quantized_matmul import mosaic_gpu_small as small

    shape = MatmulShape(rows, job["in"], job["out"], job["bits"], job["group_size"], layout=mosaic_gpu.LAYOUT)
    chosen, origin = mosaic_gpu.choose_tiling(shape, chip)
    extra = [
        small.Tiling(*values) if len(values) == 3 else large.Tiling(*values)
        for values in job["tilings"].get(str(rows), ())
    ]
    for tiling in dict.fromkeys([chosen, *extra]):
        kernel = small if isinstance(tiling, small.Tiling) else large

        def multiply(x_MI, weight, after, kernel=kernel, tiling=tiling):
            return kernel.call(x_MI, weight, tiling=tiling, after=after)

        values = list(dataclasses.astuple(tiling))
        name = f"{values} {origin if tiling == chosen else 'tried'}"
        yield multiply, {"kernel": name, "tiling": values, "origin": origin if tiling == chosen else "tried"}


def _hopper(chip: str) -> bool:
    return any(name in chip.split() for name in mosaic_gpu.HOPPER)


def _random_weight(inputs: int, outputs: int, bits: int, group_size: int, chip: str, key) -> QuantizedTensor:
    """A symmetric weight with bfloat16 scales, in the layout that the kernel of `chip` wants."""
    if not _hopper(chip):
        return op.prepack(quantized(key, inputs, outputs, bits, group_size, "bfloat16"), chip=chip)
    # Any bits are a valid packing; made in the kernel's layout at once.
    columns = -(-outputs // layout.PADDING) * layout.PADDING
    words_key, scales_key = jax.random.split(key)
    shape = (layout.chunks(inputs), columns // layout.STRIP, 64 * bits)
    packed = jax.lax.bitcast_convert_type(jax.random.bits(words_key, shape, jnp.uint32), jnp.int32)
    scales = jax.random.uniform(scales_key, (-(-inputs // group_size), columns)) * 0.01 + 0.002
    padding = columns - outputs
    return QuantizedTensor(
        packed, scales.astype(jnp.bfloat16), None, None, bits, group_size, inputs, layout.LAYOUT, padding
    )


def _reference(x_MI, weight: QuantizedTensor) -> np.ndarray:
    """The product in float32, from the dequantized weight."""

    def product(x_MI, weight):
        if weight.layout == mosaic_gpu.LAYOUT:
            full_IO = mosaic_gpu.dequantize(weight, None)
        else:
            eye_II = jnp.eye(weight.in_features, dtype=jnp.float32)
            full_IO = op.quantized_matmul(eye_II, op.unpack(weight), kernels="xla")
        return jnp.dot(x_MI.astype(jnp.float32), full_IO, precision="highest")

    return np.asarray(jax.jit(product)(x_MI, weight), np.float64)


def _bytes(job: Mapping) -> float:
    inputs, outputs = job["in"], job["out"]
    return inputs * outputs * job["bits"] / 8 + -(-inputs // job["group_size"]) * outputs * 2


def _peak(chip: str) -> float:
    return next((known.flops for known in CHIPS.values() if known.kind == chip), float("inf"))


@contextlib.contextmanager
def _turn(job: Mapping) -> Iterator[None]:
    """Waits until all processes are compiled, then for the device."""
    ready = pathlib.Path(job["folder"]) / "ready"
    ready.mkdir(exist_ok=True)
    (ready / str(os.getpid())).touch()
    deadline = time.time() + job["patience"]
    while len(list(ready.iterdir())) < job["workers"] and time.time() < deadline:
        time.sleep(0.1)
    with open(ready.parent / "device.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for line in _job(json.loads(sys.argv[1])):
        print(json.dumps(line), flush=True)
