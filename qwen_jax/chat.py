"""From a question and what was said before to the prompt's ids, within the window; and the history afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .tokenizer import Tokenizer
from .tools import ParsedResponse, ToolCall, normalize_messages, parse_response, parse_tool_calls

__all__ = ["ParsedResponse", "ToolCall", "extend_history", "parse_response", "parse_tool_calls", "prompt_ids"]

#: What was said before: upstream's pairs of question and answer, or OpenAI-style messages.
History = Sequence[Sequence[str]] | Sequence[Mapping[str, Any]]


def prompt_ids(
    tokenizer: Tokenizer,
    query: str | None = None,
    history: History | None = None,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_prompt_tokens: int | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    max_window_size: int | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """The ids of a chat prompt that ends where the assistant has to go on.

    Too long a conversation loses its oldest turns. A turn is a question and all that follows it up to the next one, so
    that a tool's result never stays without its call; system texts and the latest question (with what followed it) are
    kept whole.

    Args:
        tokenizer: knows the folder's chat format.
        query: the question; None when `messages` hold everything.
        history: what was said before, as (question, answer) pairs or as messages; never changed.
        system: the system text. None: what the format has for that case; "" is an explicit empty one.
        tools: OpenAI-style function definitions.
        max_prompt_tokens: how many ids the prompt may have; None for no limit.
        messages: OpenAI-style messages, instead of `query` and `history`.
        max_window_size: upstream's limit for the first Qwen: system text and history, without the question, stay below
            this number of ids.
        **template_kwargs: for the folder's template, such as `enable_thinking`.
    Raises: ValueError for arguments that do not fit together, and where system text and latest question alone are too
        long.
    """
    every = _all_messages(query, history, system, messages)
    pinned, groups = _turns(every)

    def encode(first: int, last: int | None = None, opened: bool = True) -> list[int]:
        kept = sorted(pinned + [number for group in groups[first:last] for number in group])
        return tokenizer.apply_chat_template([every[n] for n in kept], tools, opened, **template_kwargs)

    def fits(first: int) -> list[int] | None:
        if max_window_size is not None and first < len(groups) - 1:
            if len(encode(first, -1, opened=False)) >= max_window_size:
                return None
        ids = encode(first)
        return ids if max_prompt_tokens is None or len(ids) <= max_prompt_tokens else None

    if (ids := fits(0)) is not None:
        return ids
    low, high = 1, len(groups) - 1  # how many of the oldest turns to drop: the fewest that do
    best = fits(high)
    if best is None:
        raise ValueError(
            f"prompt: the system text and the latest question take {len(encode(high))} tokens, "
            f"but only {max_prompt_tokens} fit; shorten them, or load the model with a larger max_length."
        )
    while low < high:
        middle = (low + high) // 2
        if (ids := fits(middle)) is not None:
            best, high = ids, middle
        else:
            low = middle + 1
    return best


def extend_history(history: History | None, query: str, response: str) -> list[Any]:
    """A new list: `history` and one more turn, in the form that `history` has (pairs where it is empty)."""
    before = [dict(turn) if isinstance(turn, Mapping) else (turn[0], turn[1]) for turn in history or ()]
    if before and isinstance(before[0], dict):
        return [*before, {"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return [*before, (query, response)]


def _all_messages(query, history, system, messages) -> list[dict[str, Any]]:
    if messages is not None:
        if query is not None or history is not None:
            raise ValueError("messages: give either messages, or query and history.")
        given = list(messages)
    else:
        if query is None:
            raise ValueError("query: expected a question (or messages), got None.")
        given = [*_history_messages(history or ()), {"role": "user", "content": query}]
    every = normalize_messages(given)
    if not every:
        raise ValueError("messages: expected at least one message, got none.")
    if system is not None:
        if every[0]["role"] == "system":
            raise ValueError("system: the messages begin with a system message already; give only one of them.")
        every.insert(0, {"role": "system", "content": system})
    return every


def _history_messages(history: History) -> Iterator[Mapping[str, Any]]:
    for number, turn in enumerate(history):
        if isinstance(turn, Mapping):
            yield turn
        elif isinstance(turn, str) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history[{number}]: expected a pair (question, answer) or a message, got {turn!r}.")
        else:
            yield {"role": "user", "content": turn[0]}
            yield {"role": "assistant", "content": turn[1]}


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[list[int]]]:
    """Numbers of the messages that always stay, and of the others turn by turn; there is at least one turn.

    A user's message that is a tool's result in its tags (some clients send results so) opens no turn.
    """
    pinned: list[int] = []
    groups: list[list[int]] = [[]]
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] in ("system", "developer"):
            pinned.append(number)
            continue
        is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if message["role"] == "user" and not is_result and groups[-1]:
            groups.append([])
        groups[-1].append(number)
    return pinned, groups
