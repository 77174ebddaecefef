"""The tokenizer of the first Qwen: byte pairs from `qwen.tiktoken`, 208 control tokens, ChatML built by hand."""

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from .errors import CheckpointError
from .tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer, checked_text
from .tools import normalize_messages, react_turns

FIRST_CONTROL_ID = 151643  # fixed by upstream, whatever the vocabulary file holds
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{number}|>" for number in range(205)))
DEFAULT_SYSTEM = "You are a helpful assistant."  # of upstream's `chat`

# How upstream cuts text into words before it pairs bytes (the pattern of the GPT-4 tokenizer, one digit at a time).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Unicode's White_Space, which is what \s means above; Python's own \s has four more.
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# Runs of white space from this length on are cut by our own code: the pattern's look-ahead needs stack and steps for
# each character and fails on a million of them.
_LONG_RUN = 4096
_LONG_SPACE = re.compile(f"{_SPACE}{{{_LONG_RUN},}}")
_LINE_ENDS = "\r\n"


class TiktokenTokenizer(Tokenizer):
    """Qwen-7B-Chat's tokenizer and its relatives' of the first generation.

    Args:
        path: `qwen.tiktoken`, a line a token: its bytes in base64, its rank.

    Raises: CheckpointError for a file that is no such vocabulary.
    """

    uses_react = True

    def __init__(self, path: str | Path):
        path = Path(path)
        ranks = _read_ranks(path)
        self._control = {text: FIRST_CONTROL_ID + number for number, text in enumerate(CONTROL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self._control
        )
        self._ranks = ranks
        self._one_word: tiktoken.Encoding | None = None
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._control_pattern = re.compile("|".join(re.escape(text) for text in CONTROL_TOKENS))

    @property
    def vocab_size(self) -> int:
        """151851: upstream's vocabulary has a fixed end, whatever rows the model pads it with."""
        return FIRST_CONTROL_ID + len(CONTROL_TOKENS)

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The 208 control tokens: text → id."""
        return self._control

    @property
    def eos_token_id(self) -> int:
        """`<|endoftext|>`; chat answers also end at `<|im_end|>`."""
        return self._control[END_OF_TEXT]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; none for control tokens and for ids that the vocabulary has not."""
        return self._bytes.get(token, b"")

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """The ids of `text` in Unicode's composed form (NFC, as upstream)."""
        text = unicodedata.normalize("NFC", checked_text(text))
        if not control_tokens:
            return self._encode_plain(text)
        ids, start = [], 0
        for match in self._control_pattern.finditer(text):
            ids += self._encode_plain(text[start : match.start()])
            ids.append(self._control[match.group()])
            start = match.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for part, is_word in _cut_at_long_spaces(text):
            ids += (self._word_encoding() if is_word else self._encoding).encode_ordinary(part)
        return ids

    def _word_encoding(self) -> tiktoken.Encoding:
        """The same vocabulary with a pattern that takes its whole input as one word; made when first needed."""
        if self._one_word is None:
            self._one_word = tiktoken.Encoding(
                "one_word", pat_str=r"(?s:.+)", mergeable_ranks=self._ranks, special_tokens={}
            )
        return self._one_word

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """ChatML as upstream's `make_context` builds it: role, newline and text are encoded each for itself.

        Without a system message the system text is "You are a helpful assistant."; an empty one stays empty. Tools,
        tool calls and results become ReAct text (`qwen_jax.tools`); after a result the assistant's turn stays open, so
        that the model goes on thinking in it.

        Args:
            messages: dictionaries with `role` and `content`.
            tools: function definitions, OpenAI's or upstream's kind.
            add_generation_prompt: whether the assistant's turn is opened at the end.
            **template_kwargs: none is known here.
        """
        if template_kwargs:
            raise ValueError(
                f"chat template of the first Qwen: unknown options {sorted(template_kwargs)}; leave them out."
            )
        normal = normalize_messages(messages)
        if not normal:
            raise ValueError("messages: expected at least one message, got none.")
        if tools or any(_about_tools(message) for message in normal):
            turns, is_open = react_turns(normal, tools)
        else:
            turns, is_open = [(message["role"], message["content"]) for message in normal], False
        if turns[0][0] != "system":
            turns.insert(0, ("system", DEFAULT_SYSTEM))
        start, end, newline = [self._control[IM_START]], [self._control[IM_END]], self.encode("\n")
        ids: list[int] = []
        for number, (role, content) in enumerate(turns):
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"messages: role {role!r} is none of system, user, assistant, tool.")
            ids += (newline if number else []) + start + self.encode(role) + newline + self.encode(content)
            ids += [] if is_open and number == len(turns) - 1 else end
        if add_generation_prompt and not is_open:
            ids += newline + start + self.encode("assistant") + newline
        return ids


def _about_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("tool", "function") or bool(message.get("tool_calls") or message.get("function_call"))


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}, line {number}: expected a token in base64 and its rank, found {line[:40]!r}; "
                "the file may be truncated or a Git LFS pointer."
            ) from error
    if len(ranks) < 256 or max(ranks.values()) >= FIRST_CONTROL_ID or len(set(ranks.values())) != len(ranks):
        raise CheckpointError(
            f"{path}: expected a rank below {FIRST_CONTROL_ID} for each of at least 256 tokens, all different; "
            f"found {len(ranks)} tokens. The file may be truncated."
        )
    return ranks


def _cut_at_long_spaces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts `text` around long runs of white space exactly where the pattern would.

    What the pattern does with such a run: line ends right after a punctuation mark belong to that; then everything up
    to the run's last line end is one word; of what is left, all but the last character is one word, and the last one
    goes to what follows (all of it is one word where the text ends).

    Yields: (part, whether it is a single word); the parts joined are the text.
    """
    start = 0
    for run in _LONG_SPACE.finditer(text):
        begin, end = run.span()
        if begin > start and unicodedata.category(text[begin - 1])[0] not in "LN":
            while begin < end and text[begin] in _LINE_ENDS:
                begin += 1
        yield text[start:begin], False
        after_lines = max(text.rfind(mark, begin, end) for mark in _LINE_ENDS) + 1
        if after_lines > 0:
            yield text[begin:after_lines], True
            begin = after_lines
        keep = 0 if end == len(text) else 1
        if end - keep > begin:
            yield text[begin : end - keep], True
            begin = end - keep
        start = begin
    yield text[start:], False
