"""The public dense matmul and embedding lookup."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.chip import default_chip
from pallas_kernels.dense_matmul import exact, layout, transposed, xla
from pallas_kernels.dense_matmul.tensor import DenseTensor
from pallas_kernels.input_derivative import input_derivative
from pallas_kernels.quantized_matmul.op import Choice, check_operands, log_choice
from pallas_kernels.quantized_matmul.stack import one_bias


def dense_matmul(
    x_MI: jax.Array,
    weight: DenseTensor,
    *,
    layer: jax.Array | int | None = None,
    bias_O: jax.Array | None = None,
    out_dtype=None,
    kernels: str = "auto",
    chip: str | None = None,
) -> jax.Array:
    """Multiplies by a dense weight: out[m, o] = Σᵢ x[m, i] · w[i, o] + bias[o], sums in float32.

    It can be differentiated with respect to x alone, in reverse: weight and bias are constants.

    Args:
        x_MI: [..., in], float32, bfloat16 or float16; any leading dimensions.
        weight: DenseTensor of logical shape [in, out] or, with `layer`, [layers, in, out].
        layer: which matrix of a stack, an int or an int32 scalar (may be traced); None for a single matrix.
        bias_O: [out] or, like a stacked weight, [layers, out]; added in float32. None for no bias.
        out_dtype: of the result; None for x's.
        kernels: as for `quantized_matmul`, so that a model can hand one name to both; unless it is "exact", whose sums
            are the same in any order, it is XLA that runs here.
        chip: `device_kind` of the device it will run on; None for JAX's default device.

    Returns:
        [..., out] in `out_dtype`; the sums reach it without being rounded to x's first.

    Raises:
        ValueError: if shapes disagree.
    """
    lead = check_operands("dense_matmul", x_MI, weight, layer, bias_O)
    chip = default_chip() if chip is None else chip
    rows_MI = x_MI.reshape(math.prod(lead), weight.in_features)
    kernel = exact if choose(weight, rows_MI.shape[0], chip, kernels).name == "exact" else xla
    bias_O = one_bias(bias_O, layer)
    out_dtype = x_MI.dtype if out_dtype is None else out_dtype

    def forward(x_MI, weight, layer, bias_O):
        return kernel.run(x_MI, weight, layer, bias_O, chip, out_dtype)

    backward = functools.partial(transposed.run, dtype=x_MI.dtype, chip=chip)
    result_MO = input_derivative(forward, backward, rows_MI, weight, layer, bias_O)
    return result_MO.reshape(*lead, weight.out_features)


def choose(weight: DenseTensor, rows: int, chip: str, kernels: str = "auto") -> Choice:
    """Says how `rows` rows are multiplied by `weight` (arrays or shapes) on `chip`, a `device_kind`."""
    name, kernel = ("exact", exact) if kernels == "exact" else ("xla", xla)
    choice = Choice(name, kernel.form(weight, rows, chip))
    log_choice("dense_matmul", chip, choice)
    return choice


def embedding_lookup(weight: DenseTensor, ids: jax.Array) -> jax.Array:
    """Rows of an embedding table: [..., D] of the table's dtype for integer ids [...] in [0, V).

    Args:
        weight: DenseTensor of logical shape [D, V] (in_features = D), any layout: a tied head is the same tensor.
        ids: integers; what one outside the range gives means nothing, so check them before.
    """
    ids = jnp.asarray(ids)
    if weight.stack:
        raise ValueError(f"embedding_lookup: the table has stack {weight.stack}, expected a single matrix.")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"embedding_lookup: ids must be integers, got {ids.dtype}.")
    return xla.lookup(weight, ids)


def prepack(weight: DenseTensor, kernels: str = "auto", chip: str | None = None) -> DenseTensor:
    """The same weight in the layout that decodes fastest on `chip`; `unpack` goes back exactly.

    On a CPU pairs of 16-bit rows, or plain float32 rows; elsewhere the layout it comes in.
    """
    del kernels
    chip = default_chip() if chip is None else chip
    if chip != "cpu" or weight.in_features % 2:
        return weight
    return layout.to_row_pairs(weight) if weight.dtype in layout.SIXTEEN_BITS else layout.to_plain(weight)


def unpack(weight: DenseTensor) -> DenseTensor:
    """The same weight in layout "transposed", as files hold it."""
    return layout.to_transposed(weight)
