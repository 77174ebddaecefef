"""A decode step of a whole block of layers in one kernel launch."""

from pallas_kernels.decode_step.op import (
    MATRICES,
    MOST_ROWS,
    MULTIPROCESSORS,
    DecodeShape,
    LayerWeights,
    Tables,
    run,
    shape_of,
    unsupported,
)

__all__ = [
    "MATRICES",
    "MOST_ROWS",
    "MULTIPROCESSORS",
    "DecodeShape",
    "LayerWeights",
    "Tables",
    "run",
    "shape_of",
    "unsupported",
]
