"""Memory in which the devices of a mesh write to each other, for sums in one launch (`pallas_kernels.card_sums`)."""

import jax
import numpy as np

from pallas_kernels import card_sums
from pallas_kernels.card_sums import exchange
from pallas_kernels.chip import default_chip
from qwen_jax.sharding import DATA, MODEL, SEQUENCE, Placement


def addresses(placement: Placement, width: int, dtype: str) -> jax.Array | None:
    """Each device's row of `exchange.addresses` for sums of [rows, width] over "model", or None.

    None for what no such launch sums (`card_sums.unsupported`), and where the mesh is not `direct` or has devices along
    "sequence".
    """
    mesh = placement.mesh
    unsupported = card_sums.unsupported(1, width, placement.model, dtype, default_chip())
    if unsupported is not None or not placement.direct or placement.sequence > 1:
        return None
    order = [mesh.axis_names.index(axis) for axis in (DATA, MODEL, SEQUENCE) if axis in mesh.axis_names]
    groups = mesh.devices.transpose(order).reshape(placement.data, placement.model)
    table = np.concatenate([exchange.addresses(tuple(group), width) for group in groups])
    return placement.rows(table, ("devices", "private"))
