"""The grid of a group: scale and zero-point from the weights' extremes, or by the squared error they make."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

HALF_MAX, HALF_MIN = 65504.0, 2.0**-24  # largest and smallest positive float16, the dtype of stored scales
# Range of a group, as a part of its largest weight, that the scale search tries. Above 1, because 2^(bits − 1) steps
# lie below zero and one fewer above: a symmetric grid reaches the largest positive weight only when stretched.
SEARCH = np.linspace(0.4, 1.2, 65, dtype=np.float32)
PRECISION = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Grid:
    """What grids a group may have; see `MatrixSettings`."""

    bits: int
    sym: bool
    search: bool
    smallest_zero: int

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1


def round_onto(weight, scales, zeros, top: int):
    """The integers, as floats, whose points on the grid are nearest to `weight`."""
    return jnp.clip(jnp.round(weight / scales) + zeros, 0.0, top)


def find_grid(weight_RO, loading_R, grid: Grid):
    """Scales (float16 values in float32) and zero-points [out] of one group, the best in the sense of `grid`.

    A group of zeros has scale 1. A scale is rounded to float16 before it is judged, so that the integers make up for
    that.
    """
    low_O, high_O = jnp.minimum(weight_RO.min(0), 0.0), jnp.maximum(weight_RO.max(0), 0.0)
    if grid.sym:
        high_O = jnp.maximum(-low_O, high_O)
        low_O = -high_O
    span_O = high_O - low_O

    def at(ratio):
        scale_O = (span_O * ratio / grid.top).astype(jnp.float16).astype(jnp.float32)
        scale_O = jnp.where(span_O > 0, jnp.clip(scale_O, HALF_MIN, HALF_MAX), 1.0)
        if grid.sym:
            return scale_O, jnp.full_like(scale_O, (grid.top + 1) // 2)
        return scale_O, jnp.clip(jnp.round(-low_O * ratio / scale_O), grid.smallest_zero, grid.top)

    if not grid.search:
        return at(1.0)

    def judge(best, ratio):
        scale_O, zero_O = at(ratio)
        error_RO = scale_O * (round_onto(weight_RO, scale_O, zero_O, grid.top) - zero_O) - weight_RO
        cost_O = jnp.einsum("R,RO->O", loading_R, error_RO * error_RO, precision=PRECISION)
        better_O = cost_O < best[0]
        return tuple(
            jnp.where(better_O, new, old) for new, old in zip((cost_O, scale_O, zero_O), best, strict=True)
        ), None

    start = (jnp.full_like(span_O, jnp.inf), *at(1.0))
    (_, scale_O, zero_O), _ = lax.scan(judge, start, SEARCH)
    return scale_O, zero_O


def static_grids(target_IO, loading_I, groups: int, group_size: int, grid: Grid):
    """Scales and zero-points [groups, out] from the weights before any is rounded."""
    missing = groups * group_size - len(target_IO)
    target_GRO = jnp.pad(target_IO, ((0, missing), (0, 0))).reshape(groups, group_size, -1)
    loading_GR = jnp.pad(loading_I, (0, missing)).reshape(groups, group_size)
    return lax.map(lambda group: find_grid(group[0], group[1], grid), (target_GRO, loading_GR))
