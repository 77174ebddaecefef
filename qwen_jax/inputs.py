"""Token ids from a caller: checked, and rows moved to the left edge, whichever side their padding was on."""

import numpy as np


def check_ids(ids: np.ndarray, vocab_size: int, name: str = "input_ids") -> np.ndarray:
    """The ids as int32.

    Raises:
        ValueError: they are not integers, or one is outside 0 … vocab_size − 1.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: dtype {ids.dtype}, expected integers.")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids.max() if ids.max() >= vocab_size else ids.min()
        raise ValueError(f"{name}: token id {bad}, expected 0 to {vocab_size - 1} (vocab_size − 1).")
    return ids.astype(np.int32)


def align(input_ids, attention_mask, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of ids at the left edge.

    Args:
        input_ids: integers [B, T] or [T].
        attention_mask: 0/1 [B, T], the ones of a row adjacent; None: every id counts, whatever it is.
        vocab_size: bound of the ids.

    Returns:
        ids int32 [B, T] with zeros behind each row, lengths int32 [B], and int32 [B], where each row began.

    Raises:
        ValueError: names what is wrong with ids or mask.
    """
    ids = np.asarray(input_ids)
    if ids.ndim not in (1, 2) or not ids.size:
        raise ValueError(
            f"input_ids: shape {ids.shape}, expected [batch, tokens] with at least one token. Give a prompt."
        )
    ids_BT = check_ids(np.atleast_2d(ids), vocab_size)
    B, T = ids_BT.shape
    if attention_mask is None:
        return ids_BT, np.full(B, T, np.int32), np.zeros(B, np.int32)
    mask_BT = np.atleast_2d(np.asarray(attention_mask)).astype(bool)
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(f"attention_mask: shape {mask_BT.shape}, expected that of input_ids, {ids_BT.shape}.")
    lengths_B = mask_BT.sum(1).astype(np.int32)
    start_B = mask_BT.argmax(1).astype(np.int32)
    if not lengths_B.all():
        raise ValueError(f"attention_mask: row {int(lengths_B.argmin())} is all zeros, expected at least one token.")
    inside_BT = np.arange(T) < lengths_B[:, None]
    index_BT = np.minimum(start_B[:, None] + np.arange(T), T - 1)
    if not np.take_along_axis(mask_BT, index_BT, axis=1)[inside_BT].all():
        raise ValueError("attention_mask: a row has zeros between ones; expected padding on one side or both.")
    return np.where(inside_BT, np.take_along_axis(ids_BT, index_BT, axis=1), 0), lengths_B, start_B


def pad(ids_BT: np.ndarray, width: int) -> np.ndarray:
    """Zeros behind each row, up to `width`."""
    return np.pad(ids_BT, ((0, 0), (0, width - ids_BT.shape[1])))
