"""`qwen-jax chat`: the conversation and its /commands, Markdown that grows, and all of it on a pseudo-terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from qwen_jax.commands.chat_session import COMMANDS, Session
from qwen_jax.commands.markdown_stream import ChatMarkdown, MarkdownStream, quote_thinking, settled
from tests.successor import write_successor


class Echo:
    """A model that repeats the question in two steps; notes what it was asked with."""

    max_length = 100

    def __init__(self):
        self.asked = []

    def chat_stream(self, tokenizer, query, history, system, *, seed, **settings):
        self.asked.append((query, list(history), system, seed))
        yield query[:1]
        yield query


class Letters:
    def encode(self, text):
        return list(text.encode())

    def apply_chat_template(self, messages):
        return [0 for each in messages for _ in each["content"]]


@pytest.fixture
def session():
    return Session(Echo(), Letters(), {}, seed=7)


def test_each_question_sees_what_was_said(session):
    assert list(session.ask("one")) == ["o", "one"]
    list(session.ask("two"))
    assert session.model.asked[1] == ("two", [("one", "one")], None, 8)
    assert session.history == [("one", "one"), ("two", "two")] and session.context() == (12, 100)


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(session):
    stream = session.ask("long")
    next(stream)
    stream.close()
    assert session.history == [("long", "l")]


def test_commands(session, tmp_path):
    list(session.ask("one"))
    list(session.ask("two"))
    message, again = session.command("/retry")
    assert (message, again) == ("", "two") and session.history == [("one", "one")]
    list(session.ask(again))
    assert session.model.asked[-1][3] not in {asked[3] for asked in session.model.asked[:-1]}  # other random numbers
    assert session.command("/undo") == ("Taken back: two", None)
    assert session.command("/system Be brief.")[1] is None and session.system == "Be brief." and not session.history
    assert "Be brief." in session.command("/system")[0]
    list(session.ask("three"))
    file = tmp_path / "talk.json"
    session.command(f"/save {file}")
    session.command(f"/save {file}")  # its own file may be written again
    assert json.loads(file.read_text())["messages"] == session.messages()
    other = Session(Echo(), Letters(), {})
    other.command(f"/load {file}")
    assert (other.history, other.system) == (session.history, session.system)
    session.command(f"/save {tmp_path / 'talk.md'}")
    assert (tmp_path / "talk.md").read_text().startswith("## System\n\nBe brief.\n\n## Question\n\nthree")
    session.command("/reset")
    assert session.history == [] and session.system == "Be brief."
    assert all(name in session.command("/help")[0] for name in COMMANDS)
    session.command("/exit")
    assert session.finished


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "/nothing: no such command; /help lists them."),
        ("/retry", "/retry: there is no question yet."),
        ("/save", "/save: a file's name is missing, as in /save talk.md."),
        ("/load {folder}/bad.json", "{folder}/bad.json: is no conversation that /save wrote as JSON."),
        ("/load {folder}/odd.json", "{folder}/odd.json: expected questions and answers in turn."),
        ("/save {folder}/bad.json", "{folder}/bad.json: is there already; give another name."),
    ],
)
def test_commands_that_cannot_be_obeyed(session, tmp_path, line, message):
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "odd.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(ValueError) as error:
        session.command(line.format(folder=tmp_path))
    assert str(error.value) == message.format(folder=tmp_path)


TEXT = "# Title\n\nOne\ntwo <b>three</b>.\n\n1. first\n2. second\n\n```python\nx = 1\n\ny = 2\n```\n\nThe end."


def rendered(console, draw):
    draw(console)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_only_the_last_block_may_change():
    for end in range(len(TEXT)):
        start = settled(TEXT[:end])
        assert TEXT[:end].startswith(TEXT[:start]) and (start == 0 or TEXT[start - 1] == "\n")
    assert TEXT[settled(TEXT) :] == "The end."
    assert TEXT[: settled(TEXT[:-30])].endswith("2. second\n\n")  # inside a code block, blank lines and all


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_growing_text_ends_as_if_drawn_at_once(monkeypatch, step):
    monkeypatch.setattr("qwen_jax.commands.markdown_stream.FRAMES", 1e9)

    def stream(console):
        with MarkdownStream(console) as shown:
            for end in range(1, len(TEXT) + step, step):
                shown(TEXT[:end])

    plain = dict(width=60, color_system=None, legacy_windows=False)
    found = rendered(Console(file=io.StringIO(), **plain), stream)
    assert found == rendered(Console(file=io.StringIO(), **plain), lambda console: console.print(ChatMarkdown(TEXT)))
    assert "two <b>three</b>." in found and "One" in found  # tags are text, line breaks stay


def test_thinking_is_a_quotation():
    assert quote_thinking("<think>\na\nb") == "> a\n> b\n"
    assert quote_thinking("<think>\na\n</think>\n\nanswer") == "> a\n\nanswer"
    assert quote_thinking("a <think>") == "a <think>"


PROMPT = "of 4,096 tokens"  # of the line below the prompt, drawn when it is ready


class Terminal:
    """A command on a pseudo-terminal of 100 × 30 characters."""

    def __init__(self, *arguments, cwd=None, **environment):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (30, 100))
        variables = os.environ | {"TERM": "xterm-256color"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen_jax", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=variables,
            cwd=cwd,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def wait(self, pattern, seconds=20):
        """Reads until the pattern comes; what came before and with it, without colours and cursor movements."""
        end = time.monotonic() + seconds
        while True:
            plain = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]|\x1b\][^\x07]*\x07", "", self.seen)
            if re.search(pattern, plain, re.DOTALL):
                self.seen = ""
                return plain
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            try:
                new = os.read(self.master, 65536) if ready else b""
            except OSError:  # closed by the other side
                new = b""
            assert new, f"{pattern!r} did not come; the screen got {plain!r}"
            if b"\x1b[6n" in new:  # "where is the cursor?", which a terminal answers
                os.write(self.master, b"\x1b[1;1R")
            self.seen += new.decode(errors="replace")

    def rest(self):
        """All that still comes."""
        with contextlib.suppress(OSError):  # closed by the other side
            while new := os.read(self.master, 65536):
                self.seen += new.decode(errors="replace")
        return self.seen

    def close(self):
        """The exit code."""
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.master)


def test_on_a_terminal(tmp_path):
    model = write_successor(tmp_path / "model", "Hi 😊!")
    terminal = Terminal("chat", model, cwd=tmp_path, QWEN_JAX_CACHE=str(tmp_path / "cache"))
    terminal.wait(f"/help for more.*{PROMPT}")
    terminal.type("first\x1b\rline\r")  # Alt-Enter begins a line, Enter sends
    terminal.wait("Hi 😊.*last answer")
    terminal.type("/save talk.json\r")
    terminal.wait(f"1 questions and answers written.*{PROMPT}")
    terminal.type("/oops\r")
    terminal.wait(f"/oops: no such command; /help lists them.*{PROMPT}")
    terminal.type("half a question\x03")
    terminal.wait(f"Ctrl-D or /quit leaves.*{PROMPT}")
    terminal.type("/he\t")
    terminal.wait("/help")
    terminal.type("\r")
    terminal.wait(f"/retry .*answers the last question again.*{PROMPT}")
    terminal.type("\x04")
    assert terminal.close() == 0
    history = tmp_path / "cache" / "chat_history"
    assert "+first\n+line\n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_on_a_terminal_stops_the_answer_alone(tmp_path):
    # its tokens go round in a circle that no stop token is part of
    model = write_successor(tmp_path / "model", "abc", end=ord("d"))
    terminal = Terminal("chat", model, "--max-new-tokens", 4000, "--plain", QWEN_JAX_CACHE=str(tmp_path / "cache"))
    terminal.wait(PROMPT)
    terminal.type("go\r")
    terminal.wait("abcd")
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait("stopped.*last answer")
    terminal.type("/quit\r")
    assert terminal.close() == 0
