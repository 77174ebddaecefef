"""The conversation on a terminal: editing over several lines, recall, completion of /commands, Markdown as it comes."""

import os
import sys
import time
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console
from rich.text import Text

from ..cache_folder import cache_folder
from .chat_session import COMMANDS, Session
from .common import Typewriter
from .markdown_stream import MarkdownStream

WELCOME = "Enter sends, Alt-Enter begins a line, Ctrl-C stops an answer, Ctrl-D leaves, /help for more."


class CommandCompleter(Completer):
    """/commands at the start of a question, and files after /save and /load."""

    def get_completions(self, document, complete_event):
        """See `Completer`."""
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if space and name in ("/save", "/load"):
            yield from PathCompleter(expanduser=True).get_completions(Document(rest, len(rest)), complete_event)
        elif not space and text.startswith("/") and "\n" not in text:
            for command, what in COMMANDS.items():
                if command.startswith(text):
                    yield Completion(command, start_position=-len(text), display_meta=what.split(":")[-1].strip())


def key_bindings() -> KeyBindings:
    """Enter sends (after a backslash: begins a line), Alt-Enter begins a line.

    Ctrl-J stays the same as Enter: what is typed while an answer runs arrives with it.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event):
        event.current_buffer.insert_text("\n")

    return keys


def history_file() -> History:
    """Earlier questions, readable by the user alone; in memory where the folder cannot be written."""
    file = cache_folder() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def talk(session: Session, name: str, *, markdown: bool = True, console: Console | None = None) -> None:
    """Asks and answers until /quit or Ctrl-D.

    Args:
        session: the conversation.
        name: of the model, for the line below.
        markdown: draw answers as Markdown; else as they are.
        console: where answers go; None for standard output.
    """
    console = Console(highlight=False) if console is None else console
    label, speed = Path(name).name, ""

    def toolbar():
        used, room = session.context()
        share = f"{used:,} of {room:,} tokens" if used <= room else f"{room:,} tokens full: the oldest turns drop out"
        return HTML("{}{} · <b>{}</b>").format(share, speed, label)

    prompt = PromptSession(
        "> ",
        multiline=True,
        key_bindings=key_bindings(),
        history=history_file(),
        completer=CommandCompleter(),
        auto_suggest=AutoSuggestFromHistory(),
        prompt_continuation="  ",
        bottom_toolbar=toolbar,
        enable_history_search=True,
    )
    console.print(Text(WELCOME, style="dim"))
    while not session.finished:
        try:
            question = prompt.prompt().strip()
            if question.startswith("/"):
                message, again = session.command(question)
                if message:
                    console.print(Text(message, style="dim"))
                question = again or ""
            if question:
                speed = answer(session, question, console, markdown)
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print(Text("Ctrl-D or /quit leaves.", style="dim"))
        except (ValueError, OSError, ArithmeticError) as error:
            console.print(Text(" ".join(str(error).split()), style="red"))


def answer(session: Session, question: str, console: Console, markdown: bool) -> str:
    """Streams one answer; how fast it was, for the line below. Ctrl-C ends it, and what there is stays."""
    start = first = time.perf_counter()
    text, stopped = "", False
    stream = session.ask(question)
    console.print()
    try:
        if markdown:
            with MarkdownStream(console) as shown:
                for text in stream:
                    first = first if shown.text else time.perf_counter()
                    shown(text)
        else:
            typewriter = Typewriter(sys.stdout)
            for text in stream:
                first = first if typewriter.text else time.perf_counter()
                typewriter(text)
            typewriter.end()
            console.print()
    except KeyboardInterrupt:
        stopped = True
    finally:
        stream.close()
    end = time.perf_counter()
    if stopped:
        console.print(Text("stopped\n", style="dim"))
    tokens = len(session.tokenizer.encode(text))
    rate = f", {tokens / (end - first):.0f} tokens/s" if end > first and tokens > 1 else ""
    return f" · last answer {tokens:,} tokens{rate}, first token {first - start:.1f} s"
