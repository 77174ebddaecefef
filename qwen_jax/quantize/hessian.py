"""Second moments of a module's inputs, and what its outputs should gain, summed over calibration tokens in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.quantize.grids import PRECISION


class Moments:
    """Running means over tokens: H = mean x xᵀ [in, in], and the cross moments with what is missing from x or x W.

    Sums are float32. So are the factors, but for those that both come in the same 16 bits: their products are exact in
    float32, on the chip's fast path. Of H, which is symmetric, only the blocks on and above the diagonal are computed,
    and mirrored at the end.
    """

    def __init__(self, in_features: int):
        self.in_features = in_features
        self.tokens = 0
        self._square = None
        self._inputs = None
        self._outputs = None

    def add(self, x_BTI, mask_BT, missing_x_BTI=None, missing_y_BTO=None) -> None:
        """One batch.

        Args:
            x_BTI: inputs of the module.
            mask_BT: 1.0 for a token, 0.0 for padding.
            missing_x_BTI: what the inputs lack of those of the float model; None for nothing.
            missing_y_BTO: what the outputs shall gain beyond `missing_x_BTI` · W; None for nothing.
        """
        if self._square is None:
            self._square = jnp.zeros((self.in_features, self.in_features))
        self._square = _add_square(self._square, x_BTI, mask_BT)
        if missing_x_BTI is not None:
            if self._inputs is None:
                self._inputs = jnp.zeros((self.in_features, self.in_features))
            self._inputs = _add_product(self._inputs, x_BTI, missing_x_BTI, mask_BT)
        if missing_y_BTO is not None:
            if self._outputs is None:
                self._outputs = jnp.zeros((self.in_features, missing_y_BTO.shape[-1]))
            self._outputs = _add_product(self._outputs, x_BTI, missing_y_BTO, mask_BT)
        self.tokens += int(np.asarray(mask_BT).sum())

    def hessian(self, device: jax.Device | None = None):
        """float32 [in, in], on one device."""
        return _mirrored(jax.device_put(self._square, device), max(self.tokens, 1))

    def cross(self, weight_IO, device: jax.Device | None = None):
        """Mean of x · (missing_x · W + missing_y)ᵀ, float32 [in, out], on one device; None if nothing was missing."""
        if self._inputs is None and self._outputs is None:
            return None
        inputs_II, outputs_IO = jax.device_put((self._inputs, self._outputs), device)
        return _cross(inputs_II, outputs_IO, jnp.asarray(weight_IO, jnp.float32), max(self.tokens, 1))


def _cuts(in_features: int) -> list[int]:
    parts = 4 if in_features >= 1024 else 2 if in_features >= 256 else 1
    return [in_features * part // parts for part in range(parts + 1)]


def _tokens(x_BTI, mask_BT):
    # Selected, not multiplied: what stands in padding may be anything.
    return jnp.where(mask_BT[..., None] > 0, x_BTI, jnp.zeros((), x_BTI.dtype)).reshape(-1, x_BTI.shape[-1])


def _product(x_MI, y_MO):
    precision = None  # 16 bits lose nothing at any
    if x_MI.dtype != y_MO.dtype or x_MI.dtype.itemsize != 2:
        x_MI, y_MO, precision = x_MI.astype(jnp.float32), y_MO.astype(jnp.float32), PRECISION
    return jax.lax.dot_general(
        x_MI, y_MO, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


@functools.partial(jax.jit, donate_argnums=0)
def _add_square(total_II, x_BTI, mask_BT):
    x_MI = _tokens(x_BTI, mask_BT)
    cuts = _cuts(x_MI.shape[1])
    for row, start in enumerate(cuts[:-1]):
        rows = slice(start, cuts[row + 1])
        total_II = total_II.at[rows, start:].add(_product(x_MI[:, rows], x_MI[:, start:]))
    return total_II


@functools.partial(jax.jit, donate_argnums=0)
def _add_product(total_IO, x_BTI, y_BTO, mask_BT):
    return total_IO + _product(_tokens(x_BTI, mask_BT), _tokens(y_BTO, mask_BT))


@jax.jit
def _mirrored(total_II, tokens):
    upper_II = jnp.triu(total_II) / tokens
    return upper_II + jnp.triu(upper_II, 1).T


@jax.jit
def _cross(inputs_II, outputs_IO, weight_IO, tokens):
    total_IO = jnp.zeros(()) if outputs_IO is None else outputs_IO
    if inputs_II is not None:
        total_IO = total_IO + jnp.dot(inputs_II, weight_IO, precision=PRECISION)
    return total_IO / tokens
