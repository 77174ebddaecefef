"""Compiling single TPU kernels ahead of time, at the true shapes of models, alone on one chip."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.chip import compiling_for
from pallas_kernels.kv_attention import KVArrays, append, attend_decode
from pallas_kernels.quantized_matmul import QuantizedTensor, prepack, quantized_matmul
from qwen_jax.config import ModelConfig
from qwen_jax.plan.aot import compile_uncached, copies, mesh_of
from qwen_jax.plan.chips import CHIPS, Topology

LAYERS = 2  # of a stack: enough to see that a layer is not copied out of it


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One kernel: bytes beside its arguments, copies of weight or cache (none, if all is well), compiler's seconds."""

    temporaries: int
    copies: tuple[tuple[str, int], ...]
    seconds: float


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[in, out] of each matrix of a layer, query/key/value and gate/up side by side."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": (hidden, heads + 2 * kv_heads),
        "output": (heads, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }


def compile_matmul(
    chip: str, inputs: int, outputs: int, rows: int, bits: int = 4, group_size: int = 128, zeros: bool = False
) -> CompiledKernel:
    """A quantized matmul of one layer of a stack, with a bias; `chip` is a key of `CHIPS`."""
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    weight = QuantizedTensor(
        ShapeDtypeStruct((-(-inputs * bits // 32), outputs), jnp.int32),
        ShapeDtypeStruct((groups, outputs), jnp.float16),
        ShapeDtypeStruct((groups, outputs), jnp.uint8) if zeros else None,
        None,
        bits,
        size,
        inputs,
    )

    def run(weight, x_MI, layer, bias_O):
        return quantized_matmul(x_MI, weight, layer=layer, bias_O=bias_O, kernels="mosaic_tpu")

    with compiling_for(CHIPS[chip].kind):
        weight = jax.eval_shape(prepack, weight)
        weight = jax.tree.map(lambda leaf: ShapeDtypeStruct((LAYERS, *leaf.shape), leaf.dtype), weight)
        x_MI = ShapeDtypeStruct((rows, inputs), jnp.bfloat16)
        return _compile(chip, run, weight, x_MI, _index(), ShapeDtypeStruct((outputs,), jnp.float32))


def compile_attention(chip: str, config: ModelConfig, batch: int, context: int, kv_bits: int) -> CompiledKernel:
    """Append and attention of one decode step of one layer; `chip` is a key of `CHIPS`."""
    G, H, K = config.num_kv_heads, config.num_heads, config.head_dim
    shape = (LAYERS, batch, G, context, K)
    if kv_bits == 8:
        scales = [ShapeDtypeStruct(shape[:-1], jnp.int16)] * 4
        kv = KVArrays(*[ShapeDtypeStruct(shape, jnp.uint8)] * 2, *scales)
    else:
        kv = KVArrays(*[ShapeDtypeStruct(shape, jnp.bfloat16)] * 2)
    biased = config.attention_bias and kv_bits == 8
    table = ShapeDtypeStruct((1, context, K // 2), jnp.float32)
    operands = (
        kv,
        ShapeDtypeStruct((batch, H, K), jnp.bfloat16),
        *[ShapeDtypeStruct((batch, 1, G, K), jnp.bfloat16)] * 2,
        _index(),
        ShapeDtypeStruct((batch,), jnp.int32),
        *([ShapeDtypeStruct((G, K), jnp.float32), (table, table)] if biased else []),
    )

    def run(kv, query_BHK, key, value, layer, lengths_B, bias_GK=None, tables=None):
        kv = append(kv, layer, key, value, lengths_B - 1, heads=H, kernels="mosaic_tpu")
        options = {"key_bias_GK": bias_GK, "key_rotary": tables, "kernels": "mosaic_tpu"}
        return attend_decode(query_BHK, kv, layer, lengths_B, scale=K**-0.5, **options), kv

    with compiling_for(CHIPS[chip].kind):
        return _compile(chip, run, *operands)


def _index() -> ShapeDtypeStruct:
    return ShapeDtypeStruct((), jnp.int32)


def _compile(chip: str, run, watched, *operands) -> CompiledKernel:
    """Compiles for one chip; the first operand is donated and must not be copied."""
    sharding = NamedSharding(mesh_of(Topology(CHIPS[chip], (1,)), 1, 1), PartitionSpec())
    place = lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    watched, operands = jax.tree.map(place, (watched, operands))
    start = time.perf_counter()
    donated = (0,) if isinstance(watched, KVArrays) else ()
    compiled = compile_uncached(jax.jit(run, donate_argnums=donated).lower(watched, *operands))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # TPU programs have both
    found = tuple(copies(text, jax.tree.leaves(watched)))
    return CompiledKernel(memory.temp_size_in_bytes, found, time.perf_counter() - start)
