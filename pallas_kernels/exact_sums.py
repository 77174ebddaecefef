"""Products whose bits depend neither on the order of their sums nor on how a matrix is cut, in float32.

Within a unit of rows each operand is cut into four slices, integers of few bits times a power of two common to the
unit: products of slices, and their sums over the unit, are integers below 2^24, which float32 holds exactly, so that
every order, tiling and instruction gives the same (Ozaki, Ogita, Oishi and Rump, 2012). The units are added in their
order; where devices share them, as digits on four fixed grids, integers again, that any order adds up exactly (after
Demmel and Nguyen, 2013). Everything else is done element by element.

XLA and LLVM join a product and the sum it goes into (a · b + c, rounded once) in one program and not in another, and
the libraries that XLA calls take whole chains of operations. Here such a product is exact, by a power of two, or stands
behind a barrier, which nothing crosses.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

UNIT = 128  # rows a unit where nothing else decides: 8 bits a slice
SLICES = 4  # three would do for numbers of like size; the fourth keeps small ones beside large ones of a unit
DIGITS, DIGIT_BITS = 4, 14  # units of the digits: 1, 2^-14, 2^-28 and 2^-42; the first holds up to 2^24


def product(x, w, unit: int = UNIT):
    """x · w, float32 [..., M, O]; no less exact than a float32 dot.

    Args:
        x: float32 [..., M, I].
        w: float32 [..., I, O], the same leading dimensions or 1.
        unit: rows of w that are summed exactly; all cuts of one product must have the same.
    """
    return _sum_units(x, w, unit, lambda total, y: total + y)


def split_product(x, w, unit: int):
    """Digits [4, ..., M, O] of x · w, exact sums over units: adding the digits of several cuts is exact, too.

    Arguments as of `product`. A unit's share is rounded to a multiple of 2^-42. Sums of up to 1024 cuts do not depend
    on their order as long as the result stays below 2^24; beyond that its last bits may.
    """
    return _sum_units(x, w, unit, lambda total, y: _carry(total + _digits(y), jnp.floor), (DIGITS,))


def total(digits):
    """The number, float32, that a sum of digits stands for."""
    # Rounding down first: one number has one such row of digits, however its sum was made. Then the nearest, so that a
    # number close to 0 does not come as a difference of large digits.
    digits = _carry(_carry(digits, jnp.floor), jnp.round)
    result = digits[DIGITS - 1]
    for place in reversed(range(DIGITS - 1)):
        result = result * np.float32(2.0**-DIGIT_BITS) + digits[place]
    return result


def rms_norm(x, scale, epsilon: float):
    """x / rms(x) · scale over the last axis, float32; every operation rounded by itself."""
    squares = product(x[..., None, :], x[..., None])[..., 0]
    mean_square = lax.optimization_barrier(squares / x.shape[-1])
    # Apart from its reciprocal: XLA would take an approximation of 1 / √, one for vectors and another for what is left.
    root = lax.optimization_barrier(jnp.sqrt(mean_square + epsilon))
    normed = lax.optimization_barrier(x * lax.optimization_barrier(1.0 / root))
    return lax.optimization_barrier(normed * scale)


def turn(first, second, cos, sin):
    """The pairs (first, second) turned by an angle; each product rounded by itself."""
    first, second = lax.optimization_barrier((first, second))
    parts = first * cos, second * sin, second * cos, first * sin
    first_cos, second_sin, second_cos, first_sin = lax.optimization_barrier(parts)
    return first_cos - second_sin, second_cos + first_sin


def scaled(units, scale, minimum):
    """Minimum + scale · units; the product rounded by itself."""
    return lax.optimization_barrier(units * scale) + minimum


def unit_rows(rows: int) -> int:
    """The largest unit, at most `UNIT` rows, that divides `rows`."""
    return next(unit for unit in range(min(rows, UNIT), 0, -1) if rows % unit == 0)


def _sum_units(x, w, unit: int, add: Callable, parts: tuple[int, ...] = ()):
    units = -(-x.shape[-1] // unit)
    padding = units * unit - x.shape[-1]
    if padding:
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, padding)])
        w = jnp.pad(w, [*[(0, 0)] * (w.ndim - 2), (0, padding), (0, 0)])
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], units, unit), -2, 0)
    w = jnp.moveaxis(w.reshape(*w.shape[:-2], units, unit, w.shape[-1]), -3, 0)

    shape = jax.eval_shape(_unit, x[0], w[0]).shape
    return lax.scan(lambda sums, xw: (add(sums, _unit(*xw)), None), jnp.zeros((*parts, *shape), jnp.float32), (x, w))[0]


def _unit(x, w):
    """x · w over one unit, from slices; of their sixteen products the six smallest are left out."""
    x, w = lax.optimization_barrier((x, w))
    # The first slice is at most 2^bits, the others half of it; four products are summed at once, (1,4) (2,3) (3,2) and
    # (4,1): unit · 2^(2·bits) · (1/2 + 1/4 + 1/4 + 1/2) ≤ 2^24.
    bits = int((24 - math.log2(1.5 * x.shape[-1])) / 2)
    x_slices, x_scale = _slices(x, bits, -1)
    w_slices, w_scale = _slices(w, bits, -2)
    result = jnp.float32(0)
    for count in range(SLICES, 0, -1):  # slices whose products are of one order, the smallest first
        part = jnp.matmul(
            jnp.concatenate(x_slices[:count], axis=-1),
            jnp.concatenate(w_slices[:count][::-1], axis=-2),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        result = result * np.float32(2.0**-bits) + part
    return lax.optimization_barrier(result * x_scale * w_scale)


def _slices(array, bits: int, axis: int):
    """(integers s₀, s₁, …, scale): array ≈ scale · Σ 2^(−n·bits) · sₙ, the scale one for all along `axis`."""
    top = jnp.abs(array).max(axis, keepdims=True)
    exponent = jnp.clip(lax.bitcast_convert_type(top, jnp.int32) >> 23, bits + 1, 252)  # top < 2^(exponent − 126)
    power = lambda biased: lax.bitcast_convert_type(biased << 23, jnp.float32)  # noqa: E731
    rest, slices = array * power(253 - exponent), []
    for _ in range(SLICES):
        rest = rest * np.float32(2.0**bits)
        slices.append(jnp.round(rest))
        rest = rest - slices[-1]
    return slices, power(exponent + 1 - bits)


def _digits(y):
    """[4, ...]: y as integers times 1, 2^-14, 2^-28 and 2^-42."""
    digits = []
    for place in range(DIGITS):
        digits.append(jnp.round(y * np.float32(2.0 ** (place * DIGIT_BITS))))
        y = y - digits[-1] * np.float32(2.0 ** (-place * DIGIT_BITS))
    return jnp.stack(digits)


def _carry(digits, nearest: Callable):
    """The same number, every digit but the first between 0 and 2^14 (`jnp.floor`), or ±2^13 (`jnp.round`)."""
    parts = list(digits)
    for place in range(DIGITS - 1, 0, -1):
        over = nearest(parts[place] * np.float32(2.0**-DIGIT_BITS))
        parts[place] = parts[place] - over * np.float32(2.0**DIGIT_BITS)
        parts[place - 1] = parts[place - 1] + over
    return jnp.stack(parts)
