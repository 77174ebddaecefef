"""The tokens of a prompt written into the cache in place. (XLA would copy the whole 8-bit cache for every slot.)

XLA rounds the tokens to 8 bits and moves them to where they fall in blocks of the cache; the kernel stores the blocks.

- Grid: slots, then blocks, one more than the prompt fills, for it may start inside one. A block is loaded too, and what
  lies outside the prompt kept. Past the cache's end a block's index stands still, and nothing is written.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_attention import xla
from pallas_kernels.kv_attention.tensor import KVArrays

LANES = 128


def append(kv: KVArrays, layer, key_BTGK, value_BTGK, start_B) -> KVArrays:
    """Writes T tokens a slot of one layer; arguments as in `op.append`, scales int16 bits of float16."""
    _, B, G, S, K = kv.keys.shape
    T = key_BTGK.shape[1]
    tokens = LANES if S % LANES == 0 else S
    blocks = -(-T // tokens) + 1
    start_B = start_B.astype(jnp.int32)
    shift_B = lax.rem(start_B, jnp.int32(tokens))

    def staged(new_BTGK):
        new_BGTK = jnp.swapaxes(new_BTGK, 1, 2)
        stage = jnp.zeros((B, G, blocks * tokens, K), new_BTGK.dtype)
        for slot in range(B):
            stage = lax.dynamic_update_slice(stage, new_BGTK[slot : slot + 1], (slot, 0, shift_B[slot], 0))
        return stage

    new = [staged(key_BTGK), staged(value_BTGK)]
    arrays = [kv.keys, kv.values]
    if kv.quantized:
        arrays += [kv.key_scales, kv.key_minimums, kv.value_scales, kv.value_minimums]
        (keys, *key_parts), (values, *value_parts) = (xla.quantize(part) for part in new)
        new = [keys, values, *(lax.bitcast_convert_type(part, jnp.int16) for part in key_parts + value_parts)]
    else:
        new = [part.astype(kv.keys.dtype) for part in new]

    def block_of(slot, block, scalars):
        return jnp.minimum(lax.div(scalars[2 + slot], jnp.int32(tokens)) + block, -(-S // tokens) - 1)

    def index(slot, block, scalars):
        return scalars[0], slot, 0, block_of(slot, block, scalars), 0

    data = pl.BlockSpec((None, None, G, tokens, K), index)
    scales = pl.BlockSpec((None, None, G, tokens), lambda *grid: index(*grid)[:4])
    new_data = pl.BlockSpec((None, G, tokens, K), lambda slot, block, scalars: (slot, 0, block, 0))
    new_scales = pl.BlockSpec((None, G, tokens), lambda slot, block, scalars: (slot, 0, block))
    count = len(arrays)
    specs = [data] * 2 + [scales] * (count - 2)
    scalars = jnp.concatenate([jnp.stack([jnp.asarray(layer, jnp.int32), jnp.int32(T)]), start_B])
    moved = 3 * sum(part.nbytes for part in new)
    out = pl.pallas_call(
        functools.partial(_body, tokens=tokens, length=S, count=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, blocks),
            in_specs=[new_data] * 2 + [new_scales] * (count - 2) + specs,
            out_specs=specs,
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        input_output_aliases={1 + count + number: number for number in range(count)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=48 << 20),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name="append_prompt" + ("_8bit" if kv.quantized else ""),
    )(scalars, *new, *arrays)
    return KVArrays(*out)


def _body(scalars, *refs, tokens, length, count):
    new, old, out = refs[:count], refs[count : 2 * count], refs[2 * count :]
    slot, block = pl.program_id(0), pl.program_id(1)
    first = scalars[2 + slot]
    start = (lax.div(first, jnp.int32(tokens)) + block) * tokens
    low, high = first - start, first + scalars[1] - start  # the prompt's places in this block
    whole = (low <= 0) & (high >= tokens)

    @pl.when((start < length) & whole)
    def _():
        for source, target in zip(new, out, strict=True):
            target[...] = source[...]

    @pl.when((start < length) & jnp.logical_not(whole))
    def _():
        for source, kept, target in zip(new, old, out, strict=True):
            integers = jnp.issubdtype(source.dtype, jnp.integer)
            wide = jnp.int32 if integers else jnp.float32
            shape = (tokens, 1) if len(source.shape) == 3 else (1, tokens)
            place = lax.broadcasted_iota(jnp.int32, shape, 0 if len(source.shape) == 3 else 1)
            inside = (place >= low) & (place < high)
            if len(source.shape) == 2:
                target[...] = jnp.where(inside, source[...].astype(wide), kept[...].astype(wide)).astype(target.dtype)
                continue

            def merge(head, _, source=source, kept=kept, target=target, inside=inside, wide=wide):
                merged = jnp.where(inside, source[head].astype(wide), kept[head].astype(wide))
                target[head] = merged.astype(target.dtype)
                return 0

            lax.fori_loop(0, source.shape[0], merge, 0)
