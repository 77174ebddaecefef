"""Conversations from a file, JSON or JSON Lines, each with its line: for calibration and fine-tuning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
}


def read_text(file: Path) -> str:
    """The file's text.

    Raises:
        ValueError: not UTF-8; names file and line.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}: line {line}: is not UTF-8; save the file as UTF-8.") from error


def entries(file: Path) -> Iterator[tuple[str, Any]]:
    """("FILE: line N", value) of each entry: `.json` holds a list (or one object), `.jsonl` an object a line.

    Raises:
        ValueError: not UTF-8 or not JSON; names file and line.
    """
    text = read_text(file)
    for line, entry in _lines(text, file) if file.suffix == ".jsonl" else _elements(text, file):
        yield f"{file}: line {line}", entry


def messages(entry: Any, where: str) -> list[dict[str, str]] | str:
    """An entry's messages ({"role", "content"}), or the text of one that is no conversation.

    {"conversations": [{"from": "user", "value": "…"}, …]} as in Qwen's fine-tuning data, {"messages": [{"role": "user",
    "content": "…"}, …]}, or {"text": "…"}.

    Raises:
        ValueError: any other entry; begins with `where`.
    """
    if not isinstance(entry, dict):
        raise ValueError(
            f"{where}: is {type(entry).__name__}, expected an object with conversations, messages or text."
        )
    if isinstance(entry.get("text"), str):
        return entry["text"]
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in entry:
            return [_message(each, role_key, content_key, where) for each in _list(entry[key], key, where)]
    raise ValueError(f"{where}: has {sorted(entry)}, expected 'conversations', 'messages' or 'text'.")


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
