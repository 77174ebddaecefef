"""The chip that kernels are chosen for: the default device's, unless a program is compiled ahead for another."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # compute capability 9.0, for which our GPU kernels are written

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target_chip", default=None)


def default_chip() -> str:
    """`device_kind` of the chip named by `compiling_for`, else of JAX's default device."""
    if (named := _target.get()) is not None:
        return named
    device = jax.config.jax_default_device
    return (device if isinstance(device, jax.Device) else jax.devices(device)[0]).device_kind


def is_gpu(chip: str) -> bool:
    """Of a `device_kind`: GPUs have names of many makers, Tesla T4 and NVIDIA H100 among them."""
    return chip != "cpu" and not chip.startswith("TPU")


def is_hopper(chip: str) -> bool:
    """Of a `device_kind`."""
    return any(name in chip.split() for name in HOPPER)


@contextlib.contextmanager
def compiling_for(chip: str) -> Iterator[None]:
    """Kernels traced inside are those of `chip`, a `device_kind` that this machine need not have.

    JAX knows nothing of it: a function that was traced outside must not be reused inside, nor the other way round.
    """
    token = _target.set(chip)
    try:
        yield
    finally:
        _target.reset(token)
