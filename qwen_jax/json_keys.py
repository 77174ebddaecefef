"""Reading a checkpoint's JSON files key by key, so that none is overlooked and every error names file and key."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import CheckpointError

REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if the file is missing, is not JSON, or holds something else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint folder needs it.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download the file again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, expected a JSON object.")
    return raw


class JsonKeys:
    """Hands out the values of a JSON object, checked, and knows in the end which keys nobody asked for."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw = raw
        self.where = where
        self._asked: set[str] = set()

    def take(self, kind: type | tuple[type, ...], *names: str, default: Any = REQUIRED) -> Any:
        """The value under the first of several spellings that is there and not null.

        Args:
            kind: the type it must have; float also takes whole numbers, int takes no booleans.
            *names: spellings of one key; two that are there must agree.
            default: what an absent key means; without it the key is required.

        Raises:
            CheckpointError: for a missing, mistyped or contradictory value.
        """
        self._asked.update(names)
        found = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        if not found:
            if default is REQUIRED:
                raise CheckpointError(f"{self.where}: {' or '.join(names)} is missing; the model needs it.")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        for name, value in found.items():
            fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
            if not fits or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(each.__name__ for each in kinds)
                raise CheckpointError(f"{self.where}: {name} is {value!r}, expected {wanted}.")
        first, *others = found
        for other in others:
            if found[other] != found[first]:
                raise CheckpointError(
                    f"{self.where}: {first} is {found[first]!r} but {other}, another spelling of it, is "
                    f"{found[other]!r}; remove the wrong one."
                )
        value = found[first]
        return float(value) if kind is float else value

    def positive(self, *names: str, default: Any = REQUIRED) -> Any:
        """A whole number of at least 1."""
        value = self.take(int, *names, default=default)
        if value is not default and value < 1:
            raise CheckpointError(f"{self.where}: {names[0]} is {value}, expected at least 1.")
        return value

    def positive_float(self, *names: str, default: Any = REQUIRED) -> Any:
        """A finite number above 0."""
        value = self.take(float, *names, default=default)
        if value is not default and not 0 < value < float("inf"):
            raise CheckpointError(f"{self.where}: {names[0]} is {value}, expected a number above 0.")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them, as a tuple; empty when absent or null."""
        value = self.take((int, list), name, default=[])
        ids = value if isinstance(value, list) else [value]
        for each in ids:
            if not isinstance(each, int) or isinstance(each, bool) or each < 0:
                raise CheckpointError(f"{self.where}: {name} holds {each!r}, expected token ids of 0 or more.")
        return tuple(ids)

    def one_token_id(self, name: str) -> int | None:
        """A token id, or None when absent, null, or −1 (which some writers use for none)."""
        value = self.take(int, name, default=None)
        return None if value is None or value < 0 else value

    def must_be(self, name: str, wanted: Any, why: str) -> None:
        """Refuses any value but one (or an absent or null key)."""
        self._asked.add(name)
        value = self.raw.get(name)
        if value is not None and value != wanted:
            raise CheckpointError(f"{self.where}: {name} is {value!r}, expected {wanted!r}: {why}.")

    def ignore(self, names: Iterable[str]) -> None:
        """Marks keys as known and without meaning here."""
        self._asked.update(names)

    def unread(self) -> list[str]:
        """Keys that nothing has asked for."""
        return sorted(set(self.raw) - self._asked)

    def refuse_unread(self, advice: str, known: Collection[str] = ()) -> None:
        """CheckpointError if the file has keys that were neither read nor listed as meaningless."""
        unread = [name for name in self.unread() if name not in known]
        if unread:
            raise CheckpointError(
                f"{self.where}: unknown key{'s' if len(unread) > 1 else ''} "
                f"{', '.join(f'{name}={self.raw[name]!r:.60}' for name in unread)}; {advice}"
            )
