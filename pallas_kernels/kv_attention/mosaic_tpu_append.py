"""One new token a slot written into the cache in place, rounded to 8 bits on the way.

- Grid: slots. Each loads the tile of the cache that its token falls into (32 tokens of uint8, 128 of scales), changes
  one row or column of it and stores it back; input and output are the same memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.kv_attention.tensor import KVArrays

LANES = 128
TILE_ROWS = {1: 32, 2: 16, 4: 8}  # by bytes of an element


def append(kv: KVArrays, layer, key_BTGK, value_BTGK, start_B) -> KVArrays:
    """Writes one token a slot of one layer; arguments as in `op.append` with T = 1, scales int16 bits of float16.

    A start below 0 writes nothing: the tile it is taken to lie in is stored as it was.
    """
    _, B, G, S, K = kv.keys.shape
    arrays = [kv.keys, kv.values]
    if kv.quantized:
        arrays += [kv.key_scales, kv.key_minimums, kv.value_scales, kv.value_minimums]
    tile = TILE_ROWS[kv.keys.dtype.itemsize]
    columns = LANES if S % LANES == 0 else S

    def data_index(slot, scalars):
        return scalars[0], slot, 0, lax.div(jnp.maximum(scalars[1 + slot], 0), jnp.int32(tile)), 0

    def scale_index(slot, scalars):
        return scalars[0], slot, 0, lax.div(jnp.maximum(scalars[1 + slot], 0), jnp.int32(columns))

    data = pl.BlockSpec((None, None, G, tile, K), data_index)
    scales = pl.BlockSpec((None, None, G, columns), scale_index)
    specs = [data, data] + [scales] * (len(arrays) - 2)
    new = pl.BlockSpec((None, G, K), lambda slot, scalars: (slot, 0, 0))
    # A start beyond the room would write elsewhere; XLA's update clamps likewise.
    starts = jnp.clip(start_B.astype(jnp.int32), -1, S - 1)
    scalars = jnp.concatenate([jnp.asarray(layer, jnp.int32)[None], starts])
    moved = 2 * B * G * (2 * tile * K * kv.keys.dtype.itemsize + (8 * columns if kv.quantized else 0))
    out = pl.pallas_call(
        functools.partial(_body, quantized=kv.quantized, tile=tile, columns=columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B,),
            in_specs=[new, new, *specs],
            out_specs=specs,
            scratch_shapes=[pltpu.VMEM((G, K), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        input_output_aliases={3 + number: number for number in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name="append" + ("_8bit" if kv.quantized else ""),
    )(scalars, key_BTGK[:, 0], value_BTGK[:, 0], *arrays)
    return KVArrays(*out)


def _body(scalars, key_ref, value_ref, *refs, quantized, tile, columns):
    start = scalars[1 + pl.program_id(0)]
    row, column = lax.rem(start, jnp.int32(tile)), lax.rem(start, jnp.int32(columns))
    *refs, new_keys, new_values = refs
    inputs, outputs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    for number, (source, new) in enumerate(((key_ref, new_keys), (value_ref, new_values))):
        units = source[...].astype(jnp.float32)
        if quantized:
            units, *bits = _quantize(units)
            for ref_number, value in zip((2 + 2 * number, 3 + 2 * number), bits, strict=True):
                old = inputs[ref_number][...].astype(jnp.int32)
                here = lax.broadcasted_iota(jnp.int32, old.shape, 1) == column
                outputs[ref_number][...] = jnp.where(here, value, old).astype(jnp.int16)
        new[...] = units

    def write(head, _):
        for number, new in enumerate((new_keys, new_values)):
            old_ref, out_ref = inputs[number], outputs[number]
            old = old_ref[head]
            wide = old.astype(jnp.int32).astype(jnp.float32) if quantized else old.astype(jnp.float32)
            here = lax.broadcasted_iota(jnp.int32, old.shape, 0) == row
            changed = jnp.where(here, new[pl.ds(head, 1)], wide)
            changed = changed.astype(jnp.int32) if quantized else changed
            out_ref[head] = changed.astype(out_ref.dtype)
        return 0

    lax.fori_loop(0, key_ref.shape[0], write, 0)


def _quantize(x):
    """As `xla.quantize`: units float32 [G, K], then the float16 bits of scale and minimum, int32 [G, 1]."""
    low, high = jnp.min(x, axis=1, keepdims=True), jnp.max(x, axis=1, keepdims=True)
    minimum = tpu.half_bits_of_float(low)
    scale = tpu.half_bits_of_float((high - low) / 255.0)
    step = tpu.float_of_half_bits(scale)
    offset = x - tpu.float_of_half_bits(minimum)
    units = jnp.where(step > 0, jnp.round(offset / jnp.where(step > 0, step, 1.0)), 0.0)
    return jnp.clip(units, 0.0, 255.0), scale, minimum
