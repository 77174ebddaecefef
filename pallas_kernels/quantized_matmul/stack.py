"""Entries of arrays that are stacked over layers."""

import jax.numpy as jnp
from jax import lax


def take_layer(array, layer):
    """One layer of a stacked array (the array itself if `layer` is None)."""
    array = jnp.asarray(array)
    return array if layer is None else lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)


def one_bias(bias, layer):
    """The bias [out] of one layer, from [out], [layers, out] or None."""
    return take_layer(bias, layer) if bias is not None and bias.ndim == 2 else bias
