"""Text from token ids as they arrive: whole characters, stop strings wherever they fall, ids trimmed with the text."""

import bisect
import codecs
from collections.abc import Iterable, Sequence
from typing import Literal

from .tokenizer import Tokenizer, as_ids


class TextStream:
    """Collects the ids of one answer and gives the text that is certain so far.

    A character whose bytes are spread over several tokens appears once it is complete; "�" appears only where the bytes
    are no UTF-8 at all or where the model wrote U+FFFD itself. Text that may be the beginning of a stop string is held
    back until that is decided. Where several stop strings match, the one completed first ends the answer (the longest
    of those completed by the same character), so the result never depends on how the ids were cut into chunks.

        stream = TextStream(tokenizer, stop_strings=["Observation:"], stop_token_ids=tokenizer.stop_token_ids)
        while not stream.finished:
            print(stream.push(next_ids()))                   # the text so far
        text = stream.finish()
        ids, logprobs = ids[:stream.token_count], logprobs[:stream.token_count]

    Args:
        tokenizer: gives the bytes of an id; control tokens and ids unknown to it have none.
        stop_strings: texts that end the answer; they are no part of it.
        stop_token_ids: ids that end the answer; they are no part of it.

    Raises: ValueError for an empty stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: str | Iterable[str] = (), stop_token_ids: Iterable[int] = ()
    ):
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings: each must be a text of at least one character, got {stop!r}.")
        self.stop_token_ids = frozenset(stop_token_ids)
        self.finish_reason: Literal["stop_string", "stop_token", "end"] | None = None
        self.stopped_by: str | int | None = None
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoded = ""  # every whole character so far, cut at the stop once there is one
        self._safe = 0  # how many characters of it cannot be part of a stop string any more
        self._characters_after: list[int] = []  # characters decoded once token i was pushed

    @property
    def finished(self) -> bool:
        """Whether the answer has ended; ids pushed from here on are ignored."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text that is certain so far; each value is a prefix of the next."""
        return self._decoded[: self._safe]

    @property
    def token_count(self) -> int:
        """How many of the pushed ids the answer keeps.

        All of them, without those from a stop token on; after a stop string the fewest whose text covers what is kept
        (a token that lies across the border is kept whole).
        """
        if self.finish_reason != "stop_string":
            return len(self._characters_after)
        if not self._decoded:
            return 0
        return bisect.bisect_left(self._characters_after, len(self._decoded)) + 1

    def push(self, ids: int | Sequence[int]) -> str:
        """Takes the next id or ids and returns the text so far (all of it, not the difference)."""
        searched = len(self._decoded)
        pieces = []
        characters = searched
        for token in as_ids(ids):
            if self.finished:
                break
            if token in self.stop_token_ids:
                self.finish_reason, self.stopped_by = "stop_token", token
                break
            piece = self._decoder.decode(self._tokenizer.token_bytes(token))
            characters += len(piece)
            pieces.append(piece)
            self._characters_after.append(characters)
        self._decoded += "".join(pieces)
        self._find_stop(searched)
        self._safe = len(self._decoded) - (0 if self.finished else self._held_back())
        return self.text

    def finish(self) -> str:
        """Says that no more ids come; returns the final text: held-back text joins it, half a character does not."""
        if not self.finished:
            self.finish_reason = "end"
        self._safe = len(self._decoded)
        return self.text

    def _find_stop(self, searched: int) -> None:
        best = None
        for stop in self.stop_strings:
            start = self._decoded.find(stop, max(0, searched - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            self._decoded = self._decoded[: best[1]]
            self.finish_reason, self.stopped_by = "stop_string", best[2]

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self.stop_strings:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest
