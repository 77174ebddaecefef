"""Calibration tokens from a file: conversations (JSON or JSON Lines) through the chat template, or plain text."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.conversation_files import entries, messages, read_text

logger = logging.getLogger("qwen_jax")


def read_calibration(file: str | Path, tokenizer, *, rows: int = 128, length: int = 512) -> list[np.ndarray]:
    """At most `rows` sequences of at most `length` token ids, each int32.

    `.json` holds a list and `.jsonl` one object a line: {"conversations": [{"from": "user", "value": "…"}, …]} as in
    Qwen's fine-tuning data, {"messages": [{"role": "user", "content": "…"}, …]}, or {"text": "…"}. Conversations go
    through the chat template, one a row, longer ones cut. Any other file is UTF-8 text, cut into rows of `length`
    tokens that are taken evenly from all of it.

    Raises:
        ValueError: an empty file, not UTF-8, or a bad entry; names file and line.
    """
    file = Path(file)
    if rows < 1 or length < 2:
        raise ValueError(f"calibration: {rows} rows of {length} tokens asked for, expected at least 1 of at least 2.")
    if file.suffix in (".json", ".jsonl"):
        found = [np.asarray(_ids(entry, tokenizer, where), np.int32) for where, entry in entries(file)]
        found = _evenly(found, rows)
        longer = sum(len(ids) > length for ids in found)
        if longer:
            logger.info("%s: %d of %d rows are longer than %d tokens and were cut.", file, longer, len(found), length)
        found = [ids[:length] for ids in found if len(ids) > 1]
    else:
        ids = np.asarray(tokenizer.encode(read_text(file)), np.int32)
        # The last, shorter row counts where there is no full one.
        cuts = range(0, max(len(ids) - length + 1, 1), length)
        found = _evenly([ids[start : start + length] for start in cuts if len(ids) > 1], rows)
    if not found:
        raise ValueError(f"{file}: holds no calibration text; expected at least one row of two tokens.")
    return found


def check_rows(rows: Sequence[Any], vocab_size: int, longest: int) -> list[np.ndarray]:
    """Calibration rows as int32 arrays.

    Raises:
        ValueError: no rows, an empty row, ids outside the vocabulary, a row longer than the model allows.
    """
    checked = [np.asarray(row) for row in rows]
    if not checked:
        raise ValueError("calibration: no rows, expected at least one.")
    for number, row in enumerate(checked):
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(
                f"calibration: row {number} has shape {row.shape} and dtype {row.dtype}, expected token ids [length]."
            )
        if len(row) > longest:
            raise ValueError(
                f"calibration: row {number} has {len(row)} tokens, the model allows {longest}; cut the rows."
            )
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"calibration: row {number} holds ids from {row.min()} to {row.max()}, expected 0 to {vocab_size - 1}."
            )
    return [row.astype(np.int32) for row in checked]


def _evenly(items: list, count: int) -> list:
    if len(items) <= count:
        return items
    return [items[number * len(items) // count] for number in range(count)]


def _ids(entry: Any, tokenizer, where: str) -> list[int]:
    content = messages(entry, where)
    if isinstance(content, str):
        return tokenizer.encode(content)
    try:
        return tokenizer.apply_chat_template(content, add_generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
