"""Training examples from files: token ids, and which of them the model learns to say."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_jax.conversation_files import entries, messages
from qwen_jax.tokenizer import Tokenizer

IGNORED = -1  # target of a position that is not learned


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        ids_T: int32 token ids.
        learned_T: bool, tokens that the model learns to say.
    """

    ids_T: np.ndarray
    learned_T: np.ndarray

    @property
    def targets_T(self) -> np.ndarray:
        """int32: at each position the token to predict there, `IGNORED` where none is."""
        targets_T = np.full(len(self.ids_T), IGNORED, np.int32)
        targets_T[:-1] = np.where(self.learned_T[1:], self.ids_T[1:], IGNORED)
        return targets_T


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run learns from.

    Attributes:
        examples: conversations, at most `length` tokens each.
        cut: how many were longer and lost their end.
        cut_tokens: tokens they lost.
        dropped: how many had nothing left to learn, and are not among the examples.
    """

    examples: list[Example]
    cut: int
    cut_tokens: int
    dropped: int

    @property
    def learned_tokens(self) -> int:
        """Predictions of one pass."""
        return sum(int((example.targets_T != IGNORED).sum()) for example in self.examples)

    def digest(self) -> str:
        """A name of the content."""
        content = hashlib.sha256()
        for example in self.examples:
            content.update(np.int64(len(example.ids_T)).tobytes() + example.ids_T.tobytes())
            content.update(example.learned_T.tobytes())
        return content.hexdigest()


def read_dataset(file: str | Path, tokenizer: Tokenizer, length: int) -> Dataset:
    """Reads `.json` or `.jsonl` conversations (see `conversation_files.messages`).

    The loss is on the assistant's words and the mark that ends its turn; of {"text": …} entries on every token and the
    end of text. Longer conversations lose their end.

    Raises:
        ValueError: a bad entry or one without an assistant's turn, naming file and line; nothing to learn at all.
    """
    file = Path(file)
    if file.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{file}: expected conversations in a .json or .jsonl file.")
    found = [example(messages(entry, where), tokenizer, where) for where, entry in entries(file)]
    return collect(found, length, str(file))


def example(content: list[dict[str, str]] | str, tokenizer: Tokenizer, where: str) -> Example:
    """One conversation or text as token ids.

    Raises:
        ValueError: begins with `where`.
    """
    if isinstance(content, str):
        end = tokenizer.eos_token_id
        ids = tokenizer.encode(content) + ([] if end is None else [end])
        return Example(np.asarray(ids, np.int32), np.ones(len(ids), bool))
    try:
        ids = tokenizer.apply_chat_template(content, add_generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    learned_T = assistant_tokens(ids, tokenizer)
    turns = sum(message["role"] == "assistant" for message in content)
    if not turns:
        raise ValueError(f"{where}: has no assistant's turn, expected at least one to learn.")
    if (shown := _ends(ids, learned_T, tokenizer)) != turns:
        raise ValueError(
            f"{where}: the chat template shows {shown} turns of the assistant, expected {turns}, each from "
            "<|im_start|>assistant to <|im_end|>."
        )
    return Example(np.asarray(ids, np.int32), learned_T)


def _ends(ids: Sequence[int], learned_T: np.ndarray, tokenizer: Tokenizer) -> int:
    return int(sum(learned and token == tokenizer.im_end_id for token, learned in zip(ids, learned_T, strict=True)))


def assistant_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """bool [T]: what the assistant says in a ChatML conversation, the mark that ends its turn included.

    The marks are control tokens, which no message's text can contain (see `Tokenizer`), so that nobody's words but the
    assistant's are ever learned.
    """
    learned_T = np.zeros(len(ids), bool)
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    role = tokenizer.encode("assistant")
    place = 0
    while start is not None and place < len(ids):
        header = place + 1 + len(role)
        if ids[place] != start or list(ids[place + 1 : header]) != role:
            place += 1
            continue
        # The line end of the header; where the tokenizer joins it with the words' first characters, it is one of them.
        if header < len(ids) and tokenizer.token_bytes(int(ids[header])) == b"\n":
            header += 1
        place = header
        while place < len(ids) and ids[place] != end:
            place += 1
        learned_T[header : place + 1] = True
    return learned_T


def collect(examples: Sequence[Example], length: int, where: str) -> Dataset:
    """Cuts what is longer than `length` and drops what has nothing left to learn.

    Raises:
        ValueError: nothing is left.
    """
    longer = [len(each.ids_T) - length for each in examples if len(each.ids_T) > length]
    short = [Example(each.ids_T[:length], each.learned_T[:length]) for each in examples]
    kept = [each for each in short if (each.targets_T != IGNORED).any()]
    if not kept:
        raise ValueError(
            f"{where}: holds nothing to learn in rows of {length} tokens ({len(examples)} entries, "
            f"{len(longer)} longer); expected at least one assistant's word. Allow longer rows."
        )
    return Dataset(kept, len(longer), sum(longer), len(short) - len(kept))
