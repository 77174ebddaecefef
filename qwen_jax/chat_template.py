"""Chat templates: a folder's own Jinja template, rendered so that no text of a user can become a control token.

A template joins its own frame (`<|im_start|>`, roles, newlines) and the texts it is given into one string; encoding
that string would turn a user's "<|im_end|>" into the real one. So the texts go in with a stand-in for every piece that
a control token needs, a private-use character found nowhere else, and the template sees them otherwise as they are: it
may split, trim and search them. What is a control token in the rendered string then stems from the frame alone. The
string is cut there, the stand-ins are replaced back, and the stretches between are encoded as ordinary text. A text
without control tokens therefore gives exactly the ids of the whole rendered string.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

# What a folder without a template gets: the ChatML that every Qwen chat model is trained on, no system text invented.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PRIVATE_USE = range(0xF0000, 0x10FFFE)  # planes 15 and 16
_REASONING = ("reasoning_content", "reasoning", "thinking")


class ChatTemplate:
    """A compiled Jinja template in the environment that `transformers` documents for chat templates.

    The template is data from a checkpoint: it runs in Jinja's immutable sandbox, without access to files or Python.

    Args:
        source: the template.
        where: the file it comes from, for messages.
    """

    def __init__(self, source: str, where: str):
        self.source, self.where = source, where
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{where}: the chat template is no valid Jinja, line {error.lineno}: {error.message}"
            ) from error

    def render(self, **variables: Any) -> str:
        """The rendered text.

        Raises: ValueError with the template's own message if it refuses the conversation.
        """
        try:
            return self._template.render(**variables)
        except Exception as error:  # whatever a checkpoint's template does: its fault, and the caller learns which
            text = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.where}: the chat template refuses this conversation: {text}") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks an assistant's words for training; here it shows its contents."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes for HTML; templates are written for plain JSON.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:  # stand-ins must come out as themselves, or they could not be replaced back
        text = re.sub(r"\\ud[b-f][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}", _unescape_private, text)
    return text


def _unescape_private(match: re.Match[str]) -> str:
    character = json.loads(f'"{match.group()}"')
    return character if ord(character) in _PRIVATE_USE else match.group()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: keys without a value left out, reasoning under the name that templates read.

    `transformers` does the same. An assistant's missing content becomes "", which the templates of Qwen 3 need.
    """
    result = []
    for message in messages:
        plain = {key: value for key, value in message.items() if value is not None}
        reasoning = next((plain[key] for key in _REASONING if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        if plain.get("role") == "assistant":
            plain.setdefault("content", "")
        result.append(plain)
    return result


class StandIns:
    """Keeps control tokens out of the texts that a template is given.

    `control` are texts that must not arise from any given text. Where they contain "|" (as all of Qwen's do, and none
    of the tags that templates look for) each "|" gets a stand-in: then no splitting or joining in the template can
    build one. The others are replaced whole. `tags` are replaced in what comes from tools alone: their definitions and
    their results, for which a template has no use of its own.

    Args:
        control: texts of control tokens.
        tags: texts of further added tokens, such as `</tool_response>`.
        seen: everything that is going to be rendered; stand-ins are characters that occur nowhere in it.
    """

    def __init__(self, control: Iterable[str], tags: Iterable[str], seen: Iterable[str]):
        used = {character for text in seen for character in text if ord(character) in _PRIVATE_USE}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        pieces = {"|" if "|" in text else text for text in control}
        self._everywhere = {text: next(free) for text in sorted(pieces, key=len, reverse=True)}
        tag_texts = [tag for tag in tags if not any(piece in tag for piece in pieces)]
        self._from_tools = {text: next(free) for text in sorted(tag_texts, key=len, reverse=True)}

    def protect(self, value: Any, from_tools: bool = False) -> Any:
        """A copy of `value` (texts in lists and dictionaries, keys too) with stand-ins in place."""
        if isinstance(value, str):
            for text, character in (self._from_tools | self._everywhere if from_tools else self._everywhere).items():
                value = value.replace(text, character)
            return value
        if isinstance(value, Mapping):
            from_tools = from_tools or value.get("role") in ("tool", "function")
            return {self.protect(key, from_tools): self.protect(item, from_tools) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item, from_tools) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise ValueError(f"chat template: expected texts, numbers, lists and dictionaries, got {value!r}.")

    def restore(self, text: str) -> str:
        """The text with what the stand-ins stood for."""
        for original, character in (*self._everywhere.items(), *self._from_tools.items()):
            text = text.replace(character, original)
        return text


def texts_in(value: Any) -> Iterable[str]:
    """Every text in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
