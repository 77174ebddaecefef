"""What a call is to the Hopper matmuls, for few rows of x and for many: static properties, and the arrays they read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_fragments as fragments
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """All static properties of one call; each kernel adds what follows from them and from its own `Tiling`."""

    rows: int
    in_features: int
    out_features: int
    bits: int
    group_size: int
    stacked: bool
    static_layer: int | None
    dtype: str
    scale_dtype: str
    symmetric: bool
    bias_dtype: str | None
    bias_stacked: bool
    strips: int
    tiling: Any


def zero_rows(groups: int, columns: int) -> int:
    """Rows to allocate for `groups` rows of zero-points (bytes): a slot must begin on 128 bytes for its tensor map."""
    return next(rows for rows in range(groups, groups + 128) if rows * columns % 128 == 0)


def describe(
    x_MI: jax.Array, weight: QuantizedTensor, layer, bias, after, portable: bool
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """(a `Problem`'s fields but the tiling, the kernel's operands by name, in order).

    x is padded to whole chunks; a bias, for the interpreted form, to whole strips. `after` is read by nobody: it lets
    benchmarks make each call of a chain wait for the one before.
    """
    rows, in_features = x_MI.shape
    strips = weight.packed.shape[-2]
    static_layer = layer if isinstance(layer, int) else None
    properties = dict(
        rows=rows,
        in_features=in_features,
        out_features=weight.out_features,
        bits=weight.bits,
        group_size=weight.group_size,
        stacked=bool(weight.stack),
        static_layer=static_layer,
        dtype=fragments.name(x_MI.dtype),
        scale_dtype=fragments.name(weight.scales.dtype),
        symmetric=weight.zeros is None,
        bias_dtype=None if bias is None else fragments.name(bias.dtype),
        bias_stacked=bias is not None and bias.ndim == 2,
        strips=strips,
    )
    operands = {"x": fragments.padded(x_MI, layout.CHUNK), "packed": weight.packed, "scales": weight.scales}
    if weight.zeros is not None:
        operands["zeros"] = weight.zeros
    if weight.stack and static_layer is None:
        operands["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    if bias is not None:
        missing = strips * layout.STRIP - weight.out_features if portable else 0
        operands["bias"] = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, missing)]) if missing else bias
    if after is not None:
        operands["after"] = after
    return properties, operands
