"""Dense matmul and embedding lookup in plain XLA, the only kernel of these operations.

On a CPU XLA's `dot` copies a 16-bit weight to float32 first, and indexing a stack copies the layer. For few rows the
weight is therefore read where it lies by `block_sums`: 16-bit rows in pairs, so that the loads are whole words, or
float32 rows. For many rows the float copy, of one layer at a time, pays.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_sums
from pallas_kernels.dense_matmul import layout
from pallas_kernels.dense_matmul.tensor import DenseTensor

MAX_COPY_BYTES = 2**27  # of the float32 copy on a CPU: a head of 151936 columns is converted in parts


def form(weight: DenseTensor, rows: int, chip: str) -> str:
    """How `run` multiplies `rows` rows by `weight` on `chip`."""
    if chip != "cpu":
        return f"{weight.dtype} dot"
    if _block(weight, rows):
        return "row pairs widened in registers" if weight.layout == "row_pairs" else "rows read in place"
    return "float32 dot" if weight.dtype == "float32" else "a layer at a time converted for a float32 dot"


def run(x_MI: jax.Array, weight: DenseTensor, layer, bias_O, chip: str, out_dtype) -> jax.Array:
    """[M, O] in `out_dtype`, sums in float32."""
    rows = _block(weight, x_MI.shape[0])
    if chip != "cpu":
        result_MO = _native_dot(x_MI, weight, layer)
    elif rows and weight.layout == "row_pairs":
        terms = _pair_terms(weight.dtype, rows)
        result_MO = block_sums.block_sums(x_MI.astype(jnp.float32), weight.data, layer, rows, rows // 2, None, terms)
    elif rows:
        result_MO = block_sums.block_sums(
            x_MI.astype(jnp.float32),
            weight.data,
            layer,
            rows,
            rows,
            None,
            lambda load: (load(row).astype(jnp.float32) for row in range(rows)),
        )
    else:
        result_MO = _float32_dot(x_MI.astype(jnp.float32), weight, layer)
    if bias_O is not None:
        result_MO = result_MO + bias_O.astype(jnp.float32)
    return result_MO.astype(out_dtype)


def lookup(weight: DenseTensor, ids: jax.Array) -> jax.Array:
    """[..., D] of the table's dtype: columns `ids` of the logical [D, V] table."""
    data = jnp.asarray(weight.data)
    if weight.layout == "transposed":
        return data.at[ids].get(mode="clip")
    columns = jnp.moveaxis(data.at[:, ids].get(mode="clip"), 0, -1)
    if weight.layout == "row_pairs":
        halves = lax.bitcast_convert_type(columns, jnp.dtype(weight.dtype))
        columns = halves.reshape(*ids.shape, weight.in_features)
    return columns


def _block(weight: DenseTensor, rows: int) -> int | None:
    """Rows of a block for `block_sums`, None where a dot is the better form."""
    if rows > block_sums.MAX_ROWS or weight.layout == "transposed":
        return None
    return block_sums.block_rows(2, weight.in_features)


def _pair_terms(dtype: str, rows: int):
    def terms(load):
        for pair in range(rows // 2):
            word = load(pair)
            if dtype == "bfloat16":  # the upper half of a float32
                yield lax.bitcast_convert_type(word << 16, jnp.float32)
                yield lax.bitcast_convert_type(word & jnp.int32(-(2**16)), jnp.float32)
            else:
                for half in (word, lax.shift_right_logical(word, jnp.int32(16))):
                    yield lax.bitcast_convert_type(half.astype(jnp.int16), jnp.float16).astype(jnp.float32)

    return terms


def _native_dot(x_MI, weight: DenseTensor, layer):
    """A dot in the wider of the two types; the weight is never copied where the types agree."""
    weight = layout.to_plain(_single(weight, layer)) if weight.layout == "row_pairs" else _single(weight, layer)
    dtype = x_MI.dtype if x_MI.dtype == weight.data.dtype else jnp.float32
    return lax.dot_general(
        x_MI.astype(dtype),
        weight.data.astype(dtype),
        (((1,), (1 if weight.layout == "transposed" else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _float32_dot(x_MI, weight: DenseTensor, layer):
    """A float32 dot, converting at most `MAX_COPY_BYTES` of the weight at a time."""
    weight = _single(weight, layer)
    parts = 1 if weight.dtype == "float32" else _parts(weight.out_features, weight.in_features * 4)
    if parts == 1:
        return x_MI @ layout.to_plain(weight).data.astype(jnp.float32)
    out = weight.out_features // parts
    axis = 0 if weight.layout == "transposed" else 1

    def part(index):
        data = lax.dynamic_slice_in_dim(weight.data, index * out, out, axis)
        columns = DenseTensor(data, weight.dtype, weight.in_features, weight.layout)
        return x_MI @ layout.to_plain(columns).data.astype(jnp.float32)

    return jnp.swapaxes(lax.map(part, jnp.arange(parts, dtype=jnp.int32)), 0, 1).reshape(x_MI.shape[0], -1)


def _parts(out: int, column_bytes: int) -> int:
    """Fewest equal parts of `out` columns that each stay below `MAX_COPY_BYTES`; 1 if there are none."""
    least = -(-out * column_bytes // MAX_COPY_BYTES)
    return next((parts for parts in range(least, 4 * least + 1) if out % parts == 0), 1)


def _single(weight: DenseTensor, layer) -> DenseTensor:
    data = jnp.asarray(weight.data)
    if layer is not None:
        data = lax.dynamic_index_in_dim(data, layer, 0, keepdims=False)
    return DenseTensor(data, weight.dtype, weight.in_features, weight.layout)
