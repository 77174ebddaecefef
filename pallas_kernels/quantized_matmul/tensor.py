"""`QuantizedTensor`: a GPTQ-quantized matrix (or a stack of them) as a pytree."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A logical [*stack, in, out] matrix of 2-, 3-, 4- or 8-bit integers with a scale for each group of rows.

    w[r, o] = scales[r // group_size, o] · (q[r, o] − zeros[r // group_size, o]) for *stored* row r, which multiplies
    input `permutation[r]` (r itself without act-order). The last group may be short: groups = ceil(in / group_size).

    Leaves are numpy or jax arrays; `*stack` is () or (layers,).

    Attributes:
        packed: int32, in layout "gptq" [*stack, ceil(in · bits / 32), out]: each column is one bit stream, lowest bit
            first (4 bits: nibble i of word w is row 8w + i), as AutoGPTQ's `qweight`. Other layouts: `layout.py`.
        scales: [*stack, groups, out], float16, bfloat16 or float32.
        zeros: uint8 [*stack, groups, out], the zero-points themselves; None where every one is 2^(bits − 1).
        permutation: int32 [*stack, in], rows sorted by group (act-order); None for the natural order.
        bits: 2, 3, 4 or 8.
        group_size: rows a group, never −1 (one group a column is group_size = in_features).
        in_features: rows of one matrix.
        layout: how `packed` lies in memory.
        out_padding: columns at the end of `scales` and `zeros` that a kernel's layout added.
    """

    packed: Any
    scales: Any
    zeros: Any
    permutation: Any
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    in_features: int = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default="gptq", metadata={"static": True})
    out_padding: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def out_features(self) -> int:
        """Columns of one matrix."""
        return self.scales.shape[-1] - self.out_padding

    @property
    def groups(self) -> int:
        """Groups of rows, the last one possibly short."""
        return -(-self.in_features // self.group_size)

    @property
    def stack(self) -> tuple[int, ...]:
        """() for one matrix, (layers,) for a stack."""
        return tuple(self.scales.shape[:-2])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
