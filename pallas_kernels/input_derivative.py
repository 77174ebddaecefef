"""The derivative of a product with a weight that does not learn: with respect to its input, and nothing else."""

from collections.abc import Callable

import jax


def input_derivative(forward: Callable, transposed: Callable, x_MI, weight, layer, bias_O):
    """`forward(x_MI, weight, layer, bias_O)`; weight and bias are constants to JAX's reverse differentiation.

    Nothing is kept for the way back but the weight itself, as it lies: no dequantized copy, no activation.

    Args:
        forward: computes [M, O].
        transposed: `transposed(g_MO, weight, layer)` computes Σₒ g[m, o] · w[i, o], the derivative for x_MI, in the
            dtype of x.
        x_MI: the input.
        weight: a pytree of arrays.
        layer: an int, which stays one, an int32 scalar, or None.
        bias_O: or None.
    """
    static = layer if isinstance(layer, int) else None

    def chosen(layer):
        return layer if static is None else static

    @jax.custom_vjp
    def product(x_MI, weight, layer, bias_O):
        return forward(x_MI, weight, chosen(layer), bias_O)

    def forwards(x_MI, weight, layer, bias_O):
        return forward(x_MI, weight, chosen(layer), bias_O), (weight, layer)

    def backwards(kept, g_MO):
        weight, layer = kept
        return transposed(g_MO, weight, chosen(layer)), None, None, None

    product.defvjp(forwards, backwards)
    return product(x_MI, weight, layer if static is None else None, bias_O)
