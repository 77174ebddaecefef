"""Tokenizers of all Qwen families behind one small face; `AutoTokenizer` picks the class by a folder's own files."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError
from .json_keys import read_json

# Everything that a tokenizer may be read from; what a converter has to copy beside the weights.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
)
V1_VOCABULARY = "qwen.tiktoken"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    *Control tokens* are those that a tokenizer flags as special and all that are spelled `<|…|>`. `encode` never makes
    one out of a text unless it is asked to, and no text inside a chat message, a tool's definition or a tool's result
    ever becomes one. Tags such as `<think>` and `<tool_call>` are tokens of their own in newer families, but no control
    tokens: they are text that a user may write and that `decode` shows.
    """

    #: Whether tools are called in the ReAct text format of the first Qwen (`qwen_jax.tools`).
    uses_react: bool = False

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id; models often have more rows than that."""

    @property
    @abc.abstractmethod
    def control_tokens(self) -> Mapping[str, int]:
        """The control tokens: text → id."""

    @abc.abstractmethod
    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """The ids of `text`, nothing added.

        Args:
            text: any text; a user's may be given as it is.
            control_tokens: whether spelled-out control tokens become such. For text of your own alone.
        """

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, often only a part of a character; none for control tokens and unknown ids."""

    @abc.abstractmethod
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids of a conversation.

        Args:
            messages: dictionaries with `role` and `content`. An explicit empty system text is respected.
            tools: OpenAI-style function definitions.
            add_generation_prompt: whether the assistant's turn is opened at the end.
            **template_kwargs: what the folder's template knows, such as `enable_thinking` of Qwen 3.
        Raises: ValueError for a conversation that the format cannot express.
        """

    @property
    @abc.abstractmethod
    def eos_token_id(self) -> int | None:
        """The token that the folder names as the end of an answer."""

    @property
    def im_start_id(self) -> int | None:
        """The token that opens a chat turn; None in a vocabulary without ChatML."""
        return self.control_tokens.get(IM_START)

    @property
    def im_end_id(self) -> int | None:
        """The token that closes a chat turn; None in a vocabulary without ChatML."""
        return self.control_tokens.get(IM_END)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a chat answer, sorted: the end of a turn, the end of text, and the folder's own choice."""
        ids = {self.control_tokens.get(IM_END), self.control_tokens.get(END_OF_TEXT), self.eos_token_id}
        return tuple(sorted(token for token in ids if token is not None))

    def tool_stop_strings(self, tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
        """The texts at which an answer with `tools` has to end; empty where the model ends its turn by itself."""
        from .tools import REACT_STOP

        return (REACT_STOP,) if tools and self.uses_react else ()

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become "�", ids unknown to the tokenizer nothing.

        Args:
            ids: one id or a one-dimensional sequence or array of them.
            skip_special_tokens: leave control tokens out instead of spelling them.
        """
        control = {} if skip_special_tokens else {token: text for text, token in self.control_tokens.items()}
        pieces = (control[token].encode() if token in control else self.token_bytes(token) for token in as_ids(ids))
        return b"".join(pieces).decode("utf-8", errors="replace")


def as_ids(ids: Any) -> list[int]:
    """One id, or a sequence or array of them, as a list of Python integers.

    Raises: ValueError for more than one dimension or for numbers that are no integers.
    """
    if isinstance(ids, int):
        return [ids]
    if isinstance(ids, list) and all(type(token) is int for token in ids):
        return ids
    array = np.asarray(list(ids) if not hasattr(ids, "__array__") and isinstance(ids, Iterable) else ids)
    if array.ndim > 1:
        raise ValueError(f"ids: expected one dimension, got an array of shape {array.shape}; take one row at a time.")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"ids: expected integers, got {array.dtype}.")
    return array.reshape(-1).astype(np.int64).tolist()


class AutoTokenizer:
    """Finds the right tokenizer for a checkpoint."""

    @staticmethod
    def from_pretrained(name_or_folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, one of our own checkpoints, or a model on the Hub.

        `config.json` is looked at first: the first Qwen (`model_type: qwen`) is read by our own class from
        `qwen.tiktoken`, all others from `tokenizer.json` (without one, through `transformers`, from `vocab.json` and
        `merges.txt`). No code of a checkpoint is ever run.

        Args:
            name_or_folder: a folder, or a Hub id like "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4".
        Raises: CheckpointError if there is no such folder or model, or its files hold no tokenizer.
        """
        folder = tokenizer_folder(name_or_folder)
        model_type = optional_json(folder / "config.json").get("model_type")
        has_v1 = (folder / V1_VOCABULARY).is_file()
        has_fast = (folder / "tokenizer.json").is_file()
        if has_v1 and (model_type == "qwen" or not has_fast):
            from .tokenizer_v1 import TiktokenTokenizer

            return TiktokenTokenizer(folder / V1_VOCABULARY)
        if has_fast:
            from .tokenizer_fast import FastTokenizer

            return FastTokenizer.from_folder(folder)
        if model_type == "qwen":
            raise CheckpointError(
                f"{folder}: {V1_VOCABULARY} is missing, which holds the vocabulary of model_type 'qwen'; "
                "copy it from the original checkpoint."
            )
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            from .tokenizer_fast import FastTokenizer

            return FastTokenizer.from_vocabulary(folder)
        raise CheckpointError(
            f"{folder}: no tokenizer found (tokenizer.json, {V1_VOCABULARY}, or vocab.json with merges.txt); "
            "copy the files from the original checkpoint."
        )


def tokenizer_folder(name_or_folder: str | Path) -> Path:
    """The folder itself, or where the Hub's files of that name lie once they are downloaded (the tokenizer's alone)."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if folder.is_file() or isinstance(name_or_folder, Path) or name.count("/") != 1 or name[0] in "./~":
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(f"{name}: expected a checkpoint's folder or a Hub id (owner/name), found {found} there.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{name}: no such folder, and its tokenizer could not be had from the Hub "
            f"({type(error).__name__}: {reason}). Check the name and the network, or give a folder."
        ) from error


def checked_text(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, as "�"; ValueError for anything but a text."""
    if not isinstance(text, str):
        raise ValueError(f"text: expected a str, got {type(text).__name__}.")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist."""
    return read_json(path) if path.is_file() else {}
