"""A conversation with a model and the /commands that change it; knows nothing of a terminal."""

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

COMMANDS = {
    "/help": "shows this",
    "/clear": "forgets the conversation; the system text stays",
    "/system": "TEXT: sets the system text and begins anew; without TEXT shows it",
    "/retry": "answers the last question again, with other random numbers",
    "/undo": "takes back the last question and its answer",
    "/save": "FILE: writes the conversation, as JSON or (FILE.md) as Markdown",
    "/load": "FILE: goes on with a conversation that /save wrote as JSON",
    "/quit": "ends it, as Ctrl-D does",
}
ALIASES = {"/reset": "/clear", "/exit": "/quit", "/?": "/help"}


@dataclasses.dataclass
class Session:
    """What was said, and how the next question is asked.

    Attributes:
        model: a `QwenForCausalLM`.
        tokenizer: its tokenizer.
        settings: further arguments of `chat_stream`.
        system: the system text; None for the model's own.
        seed: of the first question; each later one and each retry takes other random numbers.
        history: finished (question, answer) pairs.
        finished: whether /quit was given.
    """

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    system: str | None = None
    seed: int = 0
    history: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    finished: bool = False
    _attempt: int = 0
    _saved: set[Path] = dataclasses.field(default_factory=set)

    def ask(self, question: str) -> Generator[str]:
        """The answer so far, growing; kept in the history when it has ended, and also where the caller stops early."""
        seed = self.seed + len(self.history) + 1000 * self._attempt
        answer = None
        try:
            for answer in self.model.chat_stream(
                self.tokenizer, question, self.history, self.system, seed=seed, **self.settings
            ):
                yield answer
        finally:
            if answer is not None:
                self.history.append((question, answer))
                self._attempt = 0

    def command(self, line: str) -> tuple[str, str | None]:
        """Obeys a /command: what to tell the user, and the question to ask again (of /retry) or None.

        Raises:
            ValueError: an unknown command, or one that cannot be obeyed now.
            OSError: a file that cannot be read or written.
        """
        name, _, rest = line.strip().partition(" ")
        name, rest = ALIASES.get(name, name), rest.strip()
        if name not in COMMANDS:
            raise ValueError(f"{name}: no such command; /help lists them.")
        question = None
        if name == "/help":
            width = max(map(len, COMMANDS))
            message = "\n".join(f"{each:{width}}  {what}" for each, what in COMMANDS.items())
        elif name == "/clear":
            self.history, message = [], "The conversation is forgotten."
        elif name == "/system":
            message = self._set_system(rest)
        elif name in ("/retry", "/undo"):
            if not self.history:
                raise ValueError(f"{name}: there is no question yet.")
            question, _ = self.history.pop()
            message = f"Taken back: {question}"
            if name == "/retry":
                self._attempt += 1
                return "", question
            question = None
        elif name == "/save":
            message = self._save(rest)
        elif name == "/load":
            message = self._load(rest)
        else:
            self.finished, message = True, ""
        return message, question

    def context(self) -> tuple[int, int]:
        """Tokens of the conversation so far, and how many the model's cache holds."""
        if not self.history:
            return 0, self.model.max_length
        return len(self.tokenizer.apply_chat_template(self.messages())), self.model.max_length

    def messages(self) -> list[dict[str, str]]:
        """The conversation as OpenAI-style messages."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": text}
            for turn in self.history
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]

    def _set_system(self, text: str) -> str:
        if not text:
            return "The model's own system text." if self.system is None else f"System text: {self.system}"
        self.system, self.history = text, []
        return "The system text is set; the conversation begins anew."

    def _save(self, name: str) -> str:
        if not name:
            raise ValueError("/save: a file's name is missing, as in /save talk.md.")
        file = Path(name).expanduser()
        if file.exists() and file.resolve() not in self._saved:
            raise ValueError(f"{file}: is there already; give another name.")
        if file.suffix == ".md":
            titles = {"system": "System", "user": "Question", "assistant": "Answer"}
            text = "\n".join(f"## {titles[each['role']]}\n\n{each['content']}\n" for each in self.messages())
        else:
            text = json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=1) + "\n"
        file.write_text(text, encoding="utf-8")
        self._saved.add(file.resolve())
        return f"{file}: {len(self.history)} questions and answers written."

    def _load(self, name: str) -> str:
        if not name:
            raise ValueError("/load: a file's name is missing, as in /load talk.json.")
        file = Path(name).expanduser()
        try:
            messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
            texts = [(each["role"], str(each["content"])) for each in messages]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: is no conversation that /save wrote as JSON.") from error
        system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
        questions, answers = texts[::2], texts[1::2]
        roles = {role for role, _ in questions}, {role for role, _ in answers}
        if len(questions) != len(answers) or roles not in (({"user"}, {"assistant"}), (set(), set())):
            raise ValueError(f"{file}: expected questions and answers in turn.")
        self.system, self.history = system, [(q, a) for (_, q), (_, a) in zip(questions, answers, strict=True)]
        return f"{file}: {len(self.history)} questions and answers read."
