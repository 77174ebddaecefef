"""Calibration tokens from a file: conversations (JSON or JSON Lines) through the chat template, or plain text."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger("qwen_jax")

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
}


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
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}: line {line}: is not UTF-8; save the file as UTF-8.") from error
    if file.suffix in (".json", ".jsonl"):
        entries = _lines(text, file) if file.suffix == ".jsonl" else _elements(text, file)
        found = [np.asarray(_ids(entry, tokenizer, f"{file}: line {line}"), np.int32) for line, entry in entries]
        found = _evenly(found, rows)
        longer = sum(len(ids) > length for ids in found)
        if longer:
            logger.info("%s: %d of %d rows are longer than %d tokens and were cut.", file, longer, len(found), length)
        found = [ids[:length] for ids in found if len(ids) > 1]
    else:
        ids = np.asarray(tokenizer.encode(text), np.int32)
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


def _lines(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}: line {line}: is not JSON ({error.msg}, column {error.colno}).") from error


def _elements(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, each with the line where it begins; a single object is a list of one."""
    decoder, place = json.JSONDecoder(), _skip(text, 0)

    def line(at: int) -> int:
        return text.count("\n", 0, at) + 1

    def decode(at: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}: line {error.lineno}: is not JSON ({error.msg}, column {error.colno})."
            ) from error

    if place == len(text):
        return
    if text[place] != "[":
        yield line(place), decode(place)[0]
        return
    place = _skip(text, place + 1)
    while text[place : place + 1] != "]":
        begin = place
        value, place = decode(place)
        yield line(begin), value
        place = _skip(text, place)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise ValueError(f"{file}: line {line(place)}: the list is not closed, expected ',' or ']'.")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _ids(entry: Any, tokenizer, where: str) -> list[int]:
    if not isinstance(entry, dict):
        raise ValueError(
            f"{where}: is {type(entry).__name__}, expected an object with conversations, messages or text."
        )
    if isinstance(entry.get("text"), str):
        return tokenizer.encode(entry["text"])
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in entry:
            messages = [_message(each, role_key, content_key, where) for each in _list(entry[key], key, where)]
            try:
                return tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where}: has {sorted(entry)}, expected 'conversations', 'messages' or 'text'.")


def _list(value: Any, key: str, where: str) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key} is {str(value)[:40]!r}, expected a list of at least one message.")
    return value


def _message(message: Any, role_key: str, content_key: str, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: a message is {str(message)[:40]!r}, expected an object.")
    role, content = message.get(role_key, message.get("role")), message.get(content_key, message.get("content"))
    if role not in ROLES:
        raise ValueError(f"{where}: {role_key} is {role!r}, expected one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(f"{where}: {content_key} is {str(content)[:40]!r}, expected a text.")
    return {"role": ROLES[role], "content": content}
