"""`DenseTensor`: a float matrix (or a stack of them) with a memory layout of its own choosing, as a pytree."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseTensor:
    """A logical [*stack, in, out] float matrix.

    Attributes:
        data: layout "plain" [*stack, in, out]; "transposed" [*stack, out, in], as Hugging Face files hold it;
            "row_pairs" int32 [*stack, in / 2, out], rows 2w and 2w + 1 in the low and the high half of word w.
        dtype: name of the element type, e.g. "bfloat16" ("row_pairs": a 16-bit one).
        in_features: rows of one matrix.
        layout: "plain", "transposed" or "row_pairs".
    """

    data: Any
    dtype: str = dataclasses.field(metadata={"static": True})
    in_features: int = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default="transposed", metadata={"static": True})

    @property
    def out_features(self) -> int:
        """Columns of one matrix."""
        return self.data.shape[-2] if self.layout == "transposed" else self.data.shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        """() for one matrix, (layers,) for a stack."""
        return tuple(self.data.shape[:-2])

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.data.nbytes
