"""Markdown that grows in a terminal: finished blocks are printed for good, the last one is drawn anew as it grows."""

import time

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner

MARGIN = 2  # lines that stay free below what is drawn anew
FRAMES = 8  # a second


def _parser() -> MarkdownIt:
    # No HTML: a model's <tag> is text to be seen, and Rich would drop it.
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


class ChatMarkdown(Markdown):
    """Markdown as chat models mean it: a line break is one, and tags are text."""

    def __init__(self, text: str):
        super().__init__(text)
        self.parsed = _parser().parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def quote_thinking(text: str) -> str:
    """The text with a leading <think>…</think> as a quotation, a line at a time, so that it may still be growing."""
    if not text.startswith("<think>"):
        return text
    thought, closed, answer = text.removeprefix("<think>").partition("</think>")
    thought = thought.strip("\n")
    quoted = "".join(f"> {line}\n" for line in thought.split("\n")) if thought else ""
    return quoted + ("\n" + answer.lstrip("\n") if closed else "")


def settled(text: str) -> int:
    """Where the last block of a text begins; what comes before it does not change any more."""
    starts = [token.map[0] for token in _parser().parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    if not starts or not starts[-1]:
        return 0
    lines = text.split("\n")
    return sum(len(line) + 1 for line in lines[: starts[-1]])


class _Lines:
    """Drawn Markdown without blank lines at its ends, which some blocks have; of a `tail` what the screen holds."""

    def __init__(self, text: str, tail: bool = False):
        self.text, self.tail = text, tail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(ChatMarkdown(self.text), options, pad=False)
        full = [number for number, line in enumerate(lines) if "".join(part.text for part in line).strip()]
        lines = lines[full[0] : full[-1] + 1] if full else []
        for line in lines[-max(console.height - MARGIN, 1) :] if self.tail else lines:
            yield from line
            yield Segment.line()


class MarkdownStream:
    """Shows a text that grows: each call gets the whole text so far. A context manager; a spinner until the first."""

    def __init__(self, console: Console, waiting: str = "thinking"):
        self.console, self.text, self._printed = console, "", 0
        self._live = Live(
            Spinner("dots", waiting, style="dim"),
            console=console,
            auto_refresh=True,
            refresh_per_second=FRAMES,
            transient=True,
        )
        self._drawn = 0.0

    def __enter__(self) -> "MarkdownStream":
        self._live.start()
        return self

    def __exit__(self, *error) -> None:
        tail = quote_thinking(self.text)[self._printed :].strip("\n")
        self._live.update(ChatMarkdown(""))
        self._live.stop()
        if tail:
            self._print(tail)

    def __call__(self, text: str) -> None:
        """Draws the text so far, at most so often as the eye sees."""
        self.text = text
        now = time.monotonic()
        if now - self._drawn < 1 / FRAMES:
            return
        self._drawn = now
        shown = quote_thinking(text)
        end = settled(shown[self._printed :])
        if end:
            self._print(shown[self._printed : self._printed + end].strip("\n"))
            self._printed += end
        self._live.update(_Lines(shown[self._printed :], tail=True))

    def _print(self, block: str) -> None:
        if block:
            self.console.print(_Lines(block))
            self.console.print()
