"""What the TPU kernels share: facts of the chips, and float16, which Mosaic TPU does not take, as the bits of int16."""

import dataclasses

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts that kernels are shaped by.

    Attributes:
        mxu: width of the matrix unit.
        vmem_bytes: on-chip memory of one core.
        cores: that share a kernel's parallel dimensions.
    """

    mxu: int
    vmem_bytes: int
    cores: int = 1


# By `device_kind`; sizes from Google's system architecture pages and `pltpu.get_tpu_info`.
CHIPS = {
    "TPU v5 lite": Chip(128, 128 << 20),
    "TPU v5e": Chip(128, 128 << 20),
    "TPU v5": Chip(128, 64 << 20, cores=2),
    "TPU v5p": Chip(128, 64 << 20, cores=2),
    "TPU v6 lite": Chip(256, 128 << 20),
    "TPU v6e": Chip(256, 128 << 20),
    "TPU7x": Chip(256, 64 << 20),
}


def refusal(chip: str) -> str | None:
    """None for a TPU the kernels are compiled for, else one sentence."""
    if chip in CHIPS:
        return None
    return f"it needs a TPU of {', '.join(CHIPS)}" if chip.startswith("TPU") else "it needs a TPU"


def keeps_float16_as_bits(chip: str) -> bool:
    """Whether float16 arrays that kernels read are kept as int16: XLA would copy them whole to reinterpret them."""
    return chip in CHIPS


def float_of_half_bits(bits):
    """float32 of float16 bits in int32 (the upper half is ignored); infinities and NaN come out finite."""
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    # Below 2^-14 the bits are a multiple of 2^-24; as a float32's they would be denormal, which a TPU flushes to zero.
    small = magnitude.astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < 0x400, small, normal)
    return jnp.where((bits & 0x8000) != 0, -value, value)


def half_bits_of_float(x):
    """The bits of float16(x), to nearest, ties to even, in the lower half of an int32; x is float32 and finite."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # A float32 of exponent −1 has steps of 2^-24, float16's smallest: adding 0.5 rounds to them.
    half = lax.bitcast_convert_type(jnp.float32(0.5), jnp.int32)
    small = lax.bitcast_convert_type(jnp.abs(x) + 0.5, jnp.int32) - half
    value = jnp.where(magnitude < (113 << 23), small, jnp.minimum(rounded, 0x7C00))
    return value | ((bits >> 16) & 0x8000)
