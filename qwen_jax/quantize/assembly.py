"""From integers in the order of rounding to what the file holds, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import layout


class Places(NamedTuple):
    """Where each row and each group of the stored tensor is to be found.

    Attributes:
        row_I: place of stored row r among the rounded rows.
        chunk_G: place of group g among the scales.
        group_I: group of stored row r.
        natural_I: the stored row that multiplies input i; None where that is row i.
    """

    row_I: np.ndarray
    chunk_G: np.ndarray
    group_I: np.ndarray
    natural_I: np.ndarray | None


def assembled(q_RO, scales_CO, zeros_CO, places: Places, *, bits: int):
    """(packed words int32 [words, out], scales float16 [groups, out], zero-points uint8, matrix float32 [in, out]).

    Args:
        q_RO: uint8, in the order of rounding, padded or not.
        scales_CO: float16 values in float32.
        zeros_CO: zero-points, in float32.
        places: see `Places`.
        bits: of an integer.
    """
    q_IO, scales_GO, zeros_GO = q_RO[places.row_I], scales_CO[places.chunk_G], zeros_CO[places.chunk_G]
    matrix_IO = scales_GO[places.group_I] * (q_IO.astype(jnp.float32) - zeros_GO[places.group_I])
    if places.natural_I is not None:
        matrix_IO = matrix_IO[places.natural_I]
    return packed(q_IO, bits), scales_GO.astype(jnp.float16), zeros_GO.astype(jnp.uint8), matrix_IO


def packed(q_IO, bits: int):
    """`layout.pack` of uint8 [in, out] that fit into `bits`."""
    in_features, out_features = q_IO.shape
    blocks = -(-in_features // layout.WORD)
    q_IO = jnp.pad(q_IO, ((0, blocks * layout.WORD - in_features), (0, 0))).astype(jnp.uint32)
    q_BRO = q_IO.reshape(blocks, layout.WORD, out_features)
    words = [jnp.zeros((blocks, out_features), jnp.uint32) for _ in range(bits)]
    for row in range(layout.WORD):
        word, shift = divmod(row * bits, layout.WORD)
        words[word] |= q_BRO[:, row] << jnp.uint32(shift)
        if shift + bits > layout.WORD:
            words[word + 1] |= q_BRO[:, row] >> jnp.uint32(layout.WORD - shift)
    words_IO = jnp.stack(words, axis=1).reshape(blocks * bits, out_features)[: layout.words(in_features, bits)]
    return jax.lax.bitcast_convert_type(words_IO, jnp.int32)
