"""`GenerationConfig`: a checkpoint's own generation settings, read from its generation_config.json."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import JsonKeys, read_json


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint recommends; None where it says nothing. Other keys are ignored, as transformers does.

    Attributes:
        eos_token_ids: ids that end a sequence, from a number or a list; None if the file has no such key.
        pad_token_id: fills short rows; says nothing about which tokens of a prompt are padding.
        bos_token_id: begins a sequence.
        do_sample: sample, or take the likeliest token.
        temperature: divides the logits, at least 0.
        top_k: keep this many tokens, 0 for all.
        top_p: keep the likeliest tokens of this total probability, in (0, 1].
        min_p: keep tokens of at least this share of the likeliest one's probability, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen, above 0; 1 for none.
        max_new_tokens: at least 1.
        chat_format: first generation: "chatml" or "raw".
        max_window_size: first generation: tokens that a chat's prompt may have.
        stop_words_ids: first generation: token sequences that end a reply.
    """

    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    chat_format: str | None = None
    max_window_size: int | None = None
    stop_words_ids: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "GenerationConfig":
        """Reads `folder`/generation_config.json; everything None if there is no such file.

        Raises:
            CheckpointError: for a value of a wrong type or out of its range; names file and key.
        """
        path = Path(folder) / "generation_config.json"
        return cls.from_dict(read_json(path), str(path)) if path.is_file() else cls()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "generation_config.json") -> "GenerationConfig":
        """The same from a parsed file; `where` begins every error message."""
        keys = JsonKeys(raw, where)

        def number(kind: type, name: str, low: float, high: float = float("inf"), above: bool = False):
            value = keys.take(kind, name, default=None)
            if value is not None and not (low < value if above else low <= value) or value is not None and value > high:
                bounds = f"{'above' if above else 'at least'} {low:g}" + (f", at most {high:g}" if high < 2 else "")
                raise CheckpointError(f"{where}: {name} is {value}, expected {bounds}.")
            return value

        stop_words = keys.take(list, "stop_words_ids", default=[])
        if not all(isinstance(word, list) and word and all(type(each) is int for each in word) for word in stop_words):
            raise CheckpointError(f"{where}: stop_words_ids is {stop_words!r:.80}, expected lists of token ids.")
        chat_format = keys.take(str, "chat_format", default=None)
        if chat_format not in (None, "chatml", "raw"):
            raise CheckpointError(f"{where}: chat_format is {chat_format!r}, expected 'chatml' or 'raw'.")
        return cls(
            eos_token_ids=keys.token_ids("eos_token_id") if raw.get("eos_token_id") is not None else None,
            pad_token_id=keys.one_token_id("pad_token_id"),
            bos_token_id=keys.one_token_id("bos_token_id"),
            do_sample=keys.take(bool, "do_sample", default=None),
            temperature=number(float, "temperature", 0),
            top_k=number(int, "top_k", 0),
            top_p=number(float, "top_p", 0, 1, above=True),
            min_p=number(float, "min_p", 0, 1),
            repetition_penalty=number(float, "repetition_penalty", 0, above=True),
            max_new_tokens=number(int, "max_new_tokens", 1),
            chat_format=chat_format,
            max_window_size=number(int, "max_window_size", 1),
            stop_words_ids=tuple(map(tuple, stop_words)),
        )
