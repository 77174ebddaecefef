"""`KVArrays`: the keys and values of all layers, in 16 or 8 bits, as a pytree."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.chip import default_chip
from pallas_kernels.tpu import keeps_float16_as_bits


def scale_dtype(chip: str | None = None) -> str:
    """Dtype of an 8-bit cache's scales and minimums on a chip (a `device_kind`; None: the default device's)."""
    return "int16" if keeps_float16_as_bits(default_chip() if chip is None else chip) else "float16"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVArrays:
    """Keys and values [layers, slots, kv_heads, length, head_dim] (L, B, G, S, K), keys already rotated.

    8-bit form: uint8, x ≈ minimum + scale · u, one scale and one minimum a token and head. Its keys lack their bias,
    which attention adds back exactly: Qwen2's key biases reach norms of 900 and would eat the 8 bits. On a TPU, whose
    kernels take no float16, scales and minimums are int16 that hold float16's bits (`scale_dtype`).

    Attributes:
        keys: [L, B, G, S, K], a float type or uint8.
        values: like keys.
        key_scales: float16 [L, B, G, S]; None in the float form, as the next three.
        key_minimums: float16 [L, B, G, S].
        value_scales: float16 [L, B, G, S].
        value_minimums: float16 [L, B, G, S].
    """

    keys: Any
    values: Any
    key_scales: Any = None
    key_minimums: Any = None
    value_scales: Any = None
    value_minimums: Any = None

    @property
    def quantized(self) -> bool:
        """Whether this is the 8-bit form."""
        return self.key_scales is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
