"""Speed of one matmul at true dimensions, with random weights made on the device.

Median µs a call: one jitted chain of calls over rotating weights of more than 256 MB (so that a GPU's L2 helps nobody),
each call waiting for the one before, the host's share cancelled. The floor is the longer of two times: the bytes of
packed weights and scales at the rate of a copy measured in the same run, and the operations at the data sheet's rate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.dense_matmul as dense_op
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu, op
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from qwen_jax.bench import floors, processes, timing
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_weights import dense, quantized
from qwen_jax.plan.chips import CHIPS

# One matrix of a layer of 7B (gate or up; query, key and value in one; down), of 1.8B (gate or up), of 72B (qkv).
SHAPES = ((4096, 11008), (4096, 12288), (11008, 4096), (2048, 5504), (8192, 24576))
ROWS = (1, 2, 4, 8, 16, 64, 256, 2048)
ROTATE_BYTES = 280e6
MOST_WEIGHTS = 128  # of small matrices a program that calls each of them would take minutes to compile
ROUND_CALLS = 60
CHECKED_ROWS = 16

type Tilings = Mapping[tuple[int, int, int, int], Sequence[Sequence]]  # (bits, in, out, rows) → tilings


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
        raise ValueError(f"--shape {text}: expected in x out, as 4096x11008.")
    return int(sizes[0]), int(sizes[1])


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    rows: Sequence[int] = ROWS,
    bits: Sequence[int] = (4,),
    group_size: int = 128,
    kernels: str = "auto",
    dtype: str = "bfloat16",
    tilings: Tilings | None = None,
    rotate_bytes: float = ROTATE_BYTES,
    patience: float = 120,
) -> tuple[float, list[dict[str, Any]]]:
    """A copy's GB/s and one record for each shape, number of bits and rows (and tiling tried).

    Args:
        shapes: (in, out).
        rows: of the activations.
        bits: 4, 8 or 16.
        group_size: inputs a scale; -1 for all.
        kernels: "auto" or a name in `op.KERNELS`.
        dtype: of activations, scales and float weights.
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
            "rows": counts,
            "kernels": kernels,
            "dtype": dtype,
            "tilings": [list((tilings or {}).get((width, inputs, outputs, count), ())) for count in counts],
            "rotate_bytes": rotate_bytes,
        }
        for width in bits
        for inputs, outputs in shapes
        for counts in ([list(rows)] if tilings is None else [[count] for count in rows])  # many to compile: spread
    ]
    copy, records = processes.run_with_copy("qwen_jax.bench.matmul", worker, jobs, patience)
    for record in records:
        for key in ("rotate_bytes", "kernels"):
            record.pop(key, None)
        floors.add_to_call(record, copy, 3, record.pop("operations_us", 0.0))
    return copy, records


class _Case(NamedTuple):
    """One line of the table, compiled: `chain` multiplies by all weights, `calls` times; the first product is kept."""

    facts: dict[str, Any]
    chain: Callable[..., list[jax.Array]]
    calls: int


def worker(jobs: Sequence[Mapping], turn: processes.Turn) -> Iterator[dict[str, Any]]:
    """Compiles the calls of all jobs, waits for the other processes, then times them."""
    chip = jax.devices()[0].device_kind
    compiled: list[tuple[Mapping, Callable, int, list[_Case]]] = []
    for job in jobs:
        make = functools.partial(_random_weight, job, chip)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(_abstract(make)))
        count, cases = min(max(4, int(job["rotate_bytes"] // size) + 1), MOST_WEIGHTS), []
        for number, rows in enumerate(job["rows"]):
            facts = {key: job[key] for key in ("in", "out", "bits", "group_size", "dtype")} | {"rows": rows}
            if job["bits"] == 16:
                del facts["group_size"]
            try:
                for multiply, named in _forms(job, rows, job["tilings"][number], chip):
                    cases.append(_compile(facts | named, multiply, make, count))
            except Exception as error:  # one that does not compile is reported, and the others still run
                yield facts | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        compiled.append((job, make, count, cases))
    with turn:
        yield {"copy": timing.copy_bandwidth() / 1e9}
        for job, make, count, cases in compiled:
            yield from _time(job, make, count, cases, chip)


def _time(job: Mapping, make: Callable, count: int, cases: Sequence[_Case], chip: str) -> Iterator[dict[str, Any]]:
    made = jax.jit(make)
    weights = [made(key) for key in jax.random.split(jax.random.key(1), count)]
    values_MI = jax.random.normal(jax.random.key(2), (max(CHECKED_ROWS, *job["rows"]), job["in"])) + 0.3
    values_MI = values_MI.astype(job["dtype"])
    want_MO = _reference(values_MI[:CHECKED_ROWS], weights[0])
    for case in cases:
        x_MI = values_MI[: case.facts["rows"]]
        try:
            got_MO = np.asarray(case.chain(x_MI, weights)[0][:CHECKED_ROWS], np.float64)
            error = np.linalg.norm(got_MO - want_MO[: len(got_MO)]) / np.linalg.norm(want_MO[: len(got_MO)])
            seconds = timing.seconds(functools.partial(case.chain, x_MI, weights)) / case.calls
        except RuntimeError as failure:  # JAX's too
            yield case.facts | {"failed": str(failure).splitlines()[0][:200]}
            continue
        yield case.facts | {
            "us": round(seconds * 1e6, 3),
            "bytes": _bytes(job),
            "operations_us": 2e6 * case.facts["rows"] * job["in"] * job["out"] / _peak(chip),
            "error": float(f"{error:.2e}"),
        }


def _abstract(make: Callable):
    return jax.eval_shape(make, jax.random.key(0))


def _compile(facts: dict, multiply: Callable, make: Callable, count: int) -> _Case:
    abstract = _abstract(make)
    x_MI = jax.ShapeDtypeStruct((facts["rows"], facts["in"]), facts["dtype"])
    chain, calls = _chain(facts, multiply, count)
    return _Case(facts, chain.lower(x_MI, [abstract] * count).compile(), calls)


def _chain(facts: dict, multiply: Callable, count: int):
    """The jitted chain over `count` weights, and its calls.

    `multiply(x_MI, weight, after)`: `after` is an earlier result that it waits for, None for none.
    """
    one = jax.jit(multiply)  # one traced function for all calls of the chain
    own = "tiling" in facts  # kernels of ours may see a weight again; of XLA's equal dots one would be left
    # As many rounds as take some milliseconds: starting a program of so many arguments takes the host some tenths. A
    # round is long, for the loop takes its own microseconds between two.
    share = min(1, 512 / facts["rows"]) if own else 0
    repeats = max(1, round(ROUND_CALLS * share / count))
    rounds = max(1, round(4 * ROUND_CALLS * share / (count * repeats)))

    def chain(x_MI, weights):
        def round_(last):
            results = [last]
            for weight in list(weights) * repeats:
                results.append(one(x_MI, weight, results[-1]))
            return results[1:]

        if not own:
            return round_(None)  # all of them: what is not used would not be computed
        first = one(x_MI, weights[0], None)
        return [first, jax.lax.fori_loop(0, rounds, lambda _, last: round_(last)[-1], first)]

    return jax.jit(chain), count * repeats * rounds + own


def _forms(job: Mapping, rows: int, tilings: Sequence, chip: str) -> Iterator[tuple[Callable, dict[str, Any]]]:
    """What multiplies `rows` rows, and its name; on a Hopper GPU once for each tiling to try."""

    def waiting(multiply: Callable) -> Callable:
        def run(x_MI, weight, after):
            if after is not None:
                x_MI, _ = jax.lax.optimization_barrier((x_MI, after))
            return multiply(x_MI, weight)

        return run

    if job["bits"] == 16:
        weight = _abstract(functools.partial(_random_weight, job, chip))
        yield waiting(dense_op.dense_matmul), {"kernel": str(dense_op.choose(weight, rows, chip))}
        return
    shape = MatmulShape(rows, job["in"], job["out"], job["bits"], job["group_size"], dtype=job["dtype"])
    if _layout(job, chip) != mosaic_gpu.LAYOUT:
        choice = op.choose(dataclasses.replace(shape, layout=_layout(job, chip)), chip, job["kernels"])
        run = functools.partial(op.quantized_matmul, kernels=job["kernels"], chip=chip)
        yield waiting(run), {"kernel": f"{choice.name} ({choice.form})"}
        return
    from pallas_kernels.quantized_matmul import mosaic_gpu_large as large
    from pallas_kernels.quantized_matmul import mosaic_gpu_small as small

    shape = dataclasses.replace(shape, layout=mosaic_gpu.LAYOUT)
    chosen, origin = mosaic_gpu.choose_tiling(shape, chip)
    for tiling in dict.fromkeys([chosen, *map(mosaic_gpu.tiling_of, tilings)]):
        kernel: Any = small if isinstance(tiling, small.Tiling) else large

        def multiply(x_MI, weight, after, kernel=kernel, tiling=tiling):
            return kernel.call(x_MI, weight, tiling=tiling, after=after)

        values, source = list(dataclasses.astuple(tiling)), origin if tiling == chosen else "tried"
        yield multiply, {"kernel": f"mosaic_gpu {values} {source}", "tiling": values, "origin": source}


def _layout(job: Mapping, chip: str) -> str:
    """That the kernel chosen for decoding wants."""
    for name in op.KERNELS if job["kernels"] == "auto" else [job["kernels"]]:
        wanted = getattr(op.KERNELS[name], "LAYOUT", "gptq")
        shape = MatmulShape(1, job["in"], job["out"], job["bits"], job["group_size"], dtype=job["dtype"])
        if op.KERNELS[name].unsupported(dataclasses.replace(shape, layout=wanted), chip) is None:
            return wanted
    return "gptq"


def _random_weight(job: Mapping, chip: str, key) -> QuantizedTensor | DenseTensor:
    """A symmetric weight with scales of the activations' dtype, in the layout that the kernel of `chip` wants."""
    inputs, outputs, bits, group_size, dtype = (job[name] for name in ("in", "out", "bits", "group_size", "dtype"))
    if bits == 16:
        return dense_op.prepack(dense(key, (outputs, inputs), dtype), chip=chip)
    if _layout(job, chip) != mosaic_gpu.LAYOUT:
        weight = quantized(key, inputs, outputs, bits, group_size, dtype)
        return op.prepack(weight, kernels=job["kernels"], chip=chip)
    # Any order of the integers is a valid packing; made in the kernel's layout at once. Normal numbers rounded, as the
    # peers have them: a card's power at large products, and so its clock, depends on the bits.
    columns = -(-outputs // layout.PADDING) * layout.PADDING
    words_key, scales_key = jax.random.split(key)
    shape = (layout.chunks(inputs), columns // layout.STRIP, 64 * bits)
    middle, packed = 2 ** (bits - 1), jnp.zeros(shape, jnp.int32)
    for place, one in enumerate(jax.random.split(words_key, 32 // bits)):
        # The largest of 128 normal numbers is about 2.7 and becomes the largest integer.
        units = jnp.round(jax.random.normal(one, shape) * (middle / 2.7)).astype(jnp.int32)
        packed |= jnp.clip(units + middle, 0, 2 * middle - 1) << (place * bits)
    scales = (jax.random.uniform(scales_key, (-(-inputs // group_size), columns)) * 0.01 + 0.002).astype(dtype)
    return QuantizedTensor(packed, scales, None, None, bits, group_size, inputs, layout.LAYOUT, columns - outputs)


def _reference(x_MI, weight: QuantizedTensor | DenseTensor) -> np.ndarray:
    """The product in float32, from the dequantized weight."""

    def product(x_MI, weight):
        if isinstance(weight, DenseTensor):
            full_IO = dense_op.unpack(weight).data.astype(jnp.float32).T
        elif weight.layout == mosaic_gpu.LAYOUT:
            full_IO = mosaic_gpu.dequantize(weight, None)
        else:
            full_IO = op.KERNELS["xla"].dequantize(op.unpack(weight), None, jnp.float32, narrow=False)
        return jnp.dot(x_MI.astype(jnp.float32), full_IO, precision="highest")

    return np.asarray(jax.jit(product)(x_MI, weight), np.float64)


def _bytes(job: Mapping) -> int:
    """Of a weight, without padding: what any kernel must read."""
    inputs, outputs, bits = job["in"], job["out"], job["bits"]
    scales = 0 if bits == 16 else -(-inputs // job["group_size"]) * outputs * jnp.dtype(job["dtype"]).itemsize
    return inputs * outputs * bits // 8 + scales


def _peak(chip: str) -> float:
    return next((known.flops for known in CHIPS.values() if known.kind == chip), math.inf)


if __name__ == "__main__":
    processes.main(worker)
