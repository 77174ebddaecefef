"""Speed of decode attention of one layer over the 8-bit and the 16-bit cache.

Each case chains one call a layer over a stacked cache larger than a GPU's L2, the output of one being the query of the
next; the host's share is cancelled. The floor is the bytes read at the rate of a copy measured in the same run.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention import op, reference, shapes
from pallas_kernels.kv_attention.tensor import KVArrays
from qwen_jax.bench import floors, processes, timing
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_numbers import by_slot

ROTATE_BYTES = 256 * 2**20  # a chain reads more than this: five times the L2 cache of an H100
MOST_BYTES = 30 * 2**30
MOST_LAYERS = 16
CHECKED_HEADS = 2  # of the last row: a float64 reference of all of them would take longer than the measurements


def dims_of(model: str) -> shapes.AttentionDims:
    """Dimensions of a model in `models.MODELS`."""
    config = MODELS[model]
    bias = config.family == "qwen" or config.attention_bias
    return shapes.AttentionDims(config.num_heads, config.num_kv_heads, config.head_dim, bias, config.num_layers)


def parse_shape(text: str) -> shapes.AttentionDims:
    """Dimensions of `32x4x128`: query heads, key/value heads, channels a head; keys without a bias."""
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes) or int(sizes[0]) % int(sizes[1]):
        raise ValueError(f"--shape {text}: expected query heads x key/value heads x channels, as 32x4x128.")
    heads, kv_heads, channels = map(int, sizes)
    return shapes.AttentionDims(heads, kv_heads, channels, False, 1)


def measure(
    models: Sequence[tuple[str, shapes.AttentionDims]],
    *,
    batch: Sequence[int] = shapes.BATCHES,
    context: Sequence[int] = shapes.CONTEXTS,
    kv_bits: Sequence[int] = (8, 16),
    kernels: str = "auto",
    dtype: str = "bfloat16",
    plans: Sequence[Mapping[str, int]] = (),
    rotate_bytes: float = ROTATE_BYTES,
    patience: float = 120,
) -> tuple[float, list[dict[str, Any]]]:
    """A copy's GB/s and one record for each case; those of more than 30 GB of cache are left out.

    Args:
        models: (name, dimensions).
        batch: rows.
        context: tokens in the cache of each row.
        kv_bits: 8 or 16.
        kernels: "auto" or a name in `op.KERNELS`.
        dtype: of queries and of the 16-bit cache.
        plans: to try besides the chosen one, on a Hopper GPU (the numbers of `mosaic_gpu_tuned`'s plans).
        rotate_bytes: that the chain of a case reads at least, unless 16 layers hold less.
        patience: seconds that processes wait for each other before the first is timed.
    """
    jobs = [
        {
            "model": name,
            "dims": list(dims),
            "batch": rows,
            "context": length,
            "kv_bits": bits,
            "kernels": kernels,
            "dtype": dtype,
            "plan": plan,
            "rotate_bytes": rotate_bytes,
        }
        for name, dims in models
        for rows in batch
        for length in context
        for bits in kv_bits
        for plan in (None, *map(dict, plans))
    ]
    jobs = [job for job in jobs if (case := _Case(job)).bytes * case.layers < MOST_BYTES]
    if not jobs:
        raise ValueError(f"Every case takes more than {MOST_BYTES / 2**30:.0f} GiB: give a smaller batch or context.")
    copy, records = processes.run_with_copy("qwen_jax.bench.attention", worker, jobs, patience)
    for record in records:
        floors.add_to_call(record, copy, 2)
    order = {_key(job): number for number, job in enumerate(jobs)}
    return copy, sorted(records, key=lambda record: order[_key(record)])


def _key(record: Mapping) -> tuple:
    return tuple(str(record.get(name)) for name in ("model", "batch", "context", "kv_bits", "plan"))


def worker(jobs: Sequence[Mapping], turn: processes.Turn) -> Iterator[dict[str, Any]]:
    """Compiles all jobs, waits for the other processes, then times them."""
    cases = []
    for job in jobs:
        case = _Case(job)
        try:
            case.compile()
            cases.append(case)
        except Exception as error:  # one that cannot run is reported, and the others still run
            yield case.facts | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    with turn:
        yield {"copy": timing.copy_bandwidth() / 1e9}
        for case in cases:
            try:
                yield case.measure()
            except RuntimeError as error:  # JAX's too
                yield case.facts | {"failed": str(error).splitlines()[0][:200]}


class _Case:
    """One line of the table."""

    def __init__(self, job: Mapping):
        self.job, self.dims = job, shapes.AttentionDims(*job["dims"])
        self.quantized, self.dtype = job["kv_bits"] == 8, job["dtype"]
        batch, context = job["batch"], job["context"]
        itemsize = jnp.dtype(self.dtype).itemsize
        self.bytes = shapes.bytes_read(self.dims, batch * context, self.quantized, itemsize)
        self.layers = int(min(max(2, -(-job["rotate_bytes"] // self.bytes)), MOST_LAYERS))
        self.shape = (self.layers, batch, self.dims.kv_heads, context, self.dims.head_dim)
        self.facts: dict[str, Any] = {key: job[key] for key in ("model", "batch", "context", "kv_bits", "dtype")}
        self.facts |= {name: getattr(self.dims, name) for name in ("heads", "kv_heads", "head_dim")}
        self.facts |= {} if job["plan"] is None else {"plan": job["plan"]}

    def compile(self) -> None:
        """Compiles one call, and the chain of one a layer."""
        abstract, (single, chain) = jax.eval_shape(self._make), self.programs(jax.devices()[0].device_kind)
        self.single, self.chain = (program.lower(*abstract).compile() for program in (single, chain))

    def programs(self, chip: str):
        """Both, jitted."""
        _, B, G, S, K = self.shape
        shape = op.AttentionShape(B, self.dims.heads, G, K, S, self.quantized, self.dtype)
        kernel = op.choose(shape, chip, self.job["kernels"]).name
        self.facts["kernel"] = kernel
        plan = {}
        if self.job["plan"] is not None:
            from pallas_kernels.kv_attention import mosaic_gpu_decode

            share, biased = self.dims.heads // G, self.quantized and self.dims.key_bias
            plan["plan"] = mosaic_gpu_decode.planned(self.job["plan"], B, G, S, share, K, self.quantized, biased)

        def attend(layer, query, kv, lengths, bias, rotary):
            return op.KERNELS[kernel].attend_decode(
                query,
                kv,
                layer,
                lengths,
                scale=K**-0.5,
                key_bias_GK=bias,
                key_rotary=rotary,
                sliding_window=None,
                active_length=S,
                **plan,
            )

        one = jax.jit(attend)  # one traced function for all layers

        def chain(query, *rest):
            for layer in range(self.layers):
                query = one(jnp.int32(layer), query, *rest)
            return query

        return jax.jit(functools.partial(attend, 0)), jax.jit(chain)

    def measure(self) -> dict[str, Any]:
        """Runs it: facts, µs, bytes, error."""
        data = jax.block_until_ready(jax.jit(self._make)())
        error = self._error(data)
        took = timing.seconds(lambda: self.chain(*data)) / self.layers
        return self.facts | {"us": round(took * 1e6, 2), "bytes": self.bytes, "error": float(f"{error:.2e}")}

    def _make(self):
        _, B, G, S, K = self.shape
        query = jax.random.normal(jax.random.key(1), (B, self.dims.heads, K), self.dtype)
        bias = rotary = None
        if self.quantized and self.dims.key_bias:
            bias = (jax.random.normal(jax.random.key(2), (G, K), jnp.float32) * 10).astype(self.dtype)
            position, pair = jnp.arange(S, dtype=jnp.float32), jnp.arange(K // 2, dtype=jnp.float32)
            angle = position[:, None] * 1e4 ** (-pair / (K // 2))
            rotary = (jnp.cos(angle)[None].astype(jnp.float32), jnp.sin(angle)[None].astype(jnp.float32))
        return query, _random_cache(self.shape, self.quantized, self.dtype), jnp.full(B, S, jnp.int32), bias, rotary

    def _error(self, data) -> float:
        """‖e‖ / ‖reference‖ of the last row's first heads, the reference in float64."""
        query, kv, lengths, bias, rotary = data
        heads = min(CHECKED_HEADS, self.dims.kv_heads)
        share = self.dims.heads // self.dims.kv_heads
        got = np.asarray(self.single(*data)[-1:, : heads * share], np.float64)
        last = jax.tree.map(lambda array: np.asarray(array[:1, -1:, :heads]), kv)
        want = reference.attend_decode(
            np.asarray(query[-1:, : heads * share], np.float64),
            last,
            0,
            np.asarray(lengths[-1:]),
            scale=self.shape[-1] ** -0.5,
            key_bias_GK=None if bias is None else np.asarray(bias[:heads], np.float64),
            key_rotary=None if rotary is None else tuple(np.asarray(table) for table in rotary),
        )
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _random_cache(shape, quantized: bool, dtype: str) -> KVArrays:
    keys = jax.random.split(jax.random.key(0), 6)
    if not quantized:
        return KVArrays(*(by_slot(key, shape, lambda k, s: jax.random.normal(k, s, dtype)) for key in keys[:2]))
    units = [by_slot(key, shape, lambda k, s: jax.random.bits(k, s, jnp.uint8)) for key in keys[:2]]
    scales = [
        jax.random.uniform(key, shape[:-1], jnp.float16, *limits)
        for key, limits in zip(keys[2:], ((0.002, 0.02), (-2.0, -0.5)) * 2, strict=True)
    ]
    return KVArrays(*units, *scales)


if __name__ == "__main__":
    processes.main(worker)
