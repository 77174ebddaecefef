"""Accelerators by name: memory, bandwidth, arithmetic and links, from their makers' data sheets."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, in bytes, bytes a second and operations a second.

    Attributes:
        name: as `--topology` takes it.
        kind: JAX's `device_kind`.
        memory: device memory.
        bandwidth: of that memory.
        flops: dense bfloat16.
        link: to its neighbours or peers, one direction, all links together.
        hop: seconds that one step of a reduction costs at least (assumed for TPUs; XLA's 20 µs measured on H100s).
        platform: "tpu" or "gpu".
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    hop: float
    platform: str = "tpu"


GIB = 1 << 30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 16 * GIB, 819e9, 197e12, 200e9, 1e-6),
        Chip("v5p", "TPU v5", 95 * GIB, 2765e9, 459e12, 600e9, 1e-6),
        Chip("v6e", "TPU v6 lite", 32 * GIB, 1640e9, 918e12, 448e9, 1e-6),
        Chip("l4", "NVIDIA L4", 24e9, 300e9, 121e12, 32e9, 20e-6, "gpu"),
        Chip("a100", "NVIDIA A100-SXM4-80GB", 80 * GIB, 2039e9, 312e12, 300e9, 20e-6, "gpu"),
        Chip("h100", "NVIDIA H100 80GB HBM3", 80 * GIB, 3350e9, 989e12, 450e9, 20e-6, "gpu"),
        Chip("h200", "NVIDIA H200", 141e9, 4800e9, 989e12, 450e9, 20e-6, "gpu"),
        Chip("b200", "NVIDIA B200", 180e9, 8000e9, 2250e12, 900e9, 20e-6, "gpu"),
    )
}
RESERVED = 0.04  # of the memory, for the runtime and the program


@dataclasses.dataclass(frozen=True)
class Topology:
    """Several chips of a kind: `v5e:2x4`, `v5p:2x2x1`, `h100:8`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
    """A topology from its name.

    Raises:
        ValueError: for an unknown chip or a shape that is not numbers joined by x.
    """
    name, _, shape = text.lower().partition(":")
    sizes = shape.split("x") if shape else ["1"]
    if name not in CHIPS or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"topology={text!r}: expected one of {list(CHIPS)} and a shape, as v5e:2x4 or h100:8.")
    return Topology(CHIPS[name], tuple(int(size) for size in sizes))
