"""`mosaic_gpu_rotate_append.rotate_append` on the NumPy emulation of a warpgroup, for arrays outside of jit."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention import KVArrays, mosaic_gpu_append
from pallas_kernels.kv_attention import mosaic_gpu_rotate_append as kernel
from tests.pallas_kernels import warp_emulator as emulator


def rotate_append(*arguments, **options):
    """(queries, cache) as the kernel leaves them, the blocks one after the other."""
    kv = jax.tree.map(np.asarray, arguments[1])
    shape, operands = kernel.prepare(*arguments, **options)
    _, B, _, _, K = shape.cache
    named = {name: np.asarray(array) for name, array in operands.items()} | kernel.cache_refs(kv)
    named["query"] = np.full((B, shape.heads, K), np.nan, np.asarray(arguments[0]).dtype)
    pointers = {name: emulator.Pointer(emulator.Memory(array)) for name, array in named.items()}
    with mock.patch.object(mosaic_gpu_append, "w", emulator), mock.patch.object(kernel, "w", emulator):
        for block in range(-(-shape.rows // kernel.WARPS)):
            kernel._rows(shape, emulator.i32(block), pointers)

    def result(name):
        return jnp.asarray(pointers[name].memory.as_array(named[name].dtype, named[name].shape))

    return result("query"), KVArrays(**{name: result(name) for name in kernel.cache_refs(kv)})
