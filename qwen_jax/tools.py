"""Tool calls: `<tool_call>` blocks of Qwen 2.5 and newer, and the ReAct text format of the first Qwen."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

# What ends an answer that calls a tool in the ReAct format: the model would go on and invent the tool's result.
REACT_STOP = "Observation:"

# The wording that Qwen-7B-Chat and its sisters were trained on (QwenLM/Qwen, openai_api.py, after ReAct,
# arXiv:2210.03629): a format, not prose; a model calls tools worse with any other wording.
_REACT_TOOL = (
    "{name}: Call this tool to interact with the {human_name} API. What is the {human_name} API useful for? "
    "{description} Parameters: {parameters}"
)
_REACT_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_REACT_ANSWER = "Thought: I now know the final answer.\nFinal Answer: "

_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call that the model asks for.

    `arguments` is the decoded JSON object; the raw text where a ReAct answer's input is not a JSON object (code, say).
    """

    name: str
    arguments: dict[str, Any] | str

    def to_openai(self, call_id: str | None = None) -> dict[str, Any]:
        """The call as an entry of a message's `tool_calls` (arguments are a JSON text there)."""
        text = self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)
        call = {"type": "function", "function": {"name": self.name, "arguments": text}}
        return call if call_id is None else {"id": call_id, **call}


@dataclasses.dataclass(frozen=True)
class ParsedResponse:
    """An answer in parts: what is said to the user, the thinking before it (None: there is none), the tool calls."""

    content: str
    thinking: str | None
    tool_calls: tuple[ToolCall, ...]


def parse_tool_calls(text: str) -> list[ToolCall]:
    """The tool calls in an answer of Qwen 2.5 or newer: JSON objects with `name` and `arguments` in `<tool_call>` tags.

    Blocks inside the thinking and blocks that hold no such object are no calls. The closing tag may be missing at the
    end, as after a stop string.
    """
    return list(parse_response(text).tool_calls)


def parse_response(text: str, *, react: bool = False) -> ParsedResponse:
    """Takes an answer apart.

    Args:
        text: what the model wrote.
        react: the ReAct format of the first Qwen instead of `<tool_call>` tags (there, too, thinking is only what
            stands in `<think>` tags; the thought before an action is the content).
    """
    thinking, content = _split_thinking(text)
    if react:
        content, calls = _parse_react(content)
        return ParsedResponse(content, thinking, calls)
    calls = []

    def take(match: re.Match[str]) -> str:
        call = _json_call(match.group(1))
        if call is None:
            return match.group(0)  # not a call: stays in the text, where the user sees it
        calls.append(call)
        return ""

    rest = _TOOL_CALL.sub(take, content)
    return ParsedResponse(rest.strip() if calls else content, thinking, tuple(calls))


def _split_thinking(text: str) -> tuple[str | None, str]:
    if "</think>" in text:  # the opening tag may be part of the prompt
        before, _, after = text.rpartition("</think>")
        return before.replace("<think>", "", 1).strip("\n"), after.lstrip("\n")
    if text.lstrip().startswith("<think>"):  # cut off while thinking
        return text.lstrip()[len("<think>") :].strip("\n"), ""
    return None, text


def _json_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = _arguments(call.get("arguments", {}))
    return ToolCall(call["name"], arguments) if isinstance(arguments, dict) else None


def _arguments(value: Any) -> Any:
    """A JSON object given as text becomes the object; anything else stays what it is."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            return value
        return parsed if isinstance(parsed, dict) else value
    return value


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI-style messages as chat templates want them; the caller's objects are left alone.

    A list of text parts becomes one text; a tool call's arguments given as JSON text become the object (templates write
    them out as JSON themselves); a message without content that calls tools has the content "".

    Raises: ValueError for messages without a role and for parts that are no text.
    """
    result = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{number}]: expected a dictionary with a role, got {message!r}.")
        message = dict(message)
        content = message.get("content")
        if isinstance(content, list | tuple):
            if not all(isinstance(part, str) or (part.get("type") == "text" and "text" in part) for part in content):
                raise ValueError(f"messages[{number}].content: only text parts can be read, got {content!r}.")
            message["content"] = "".join(part if isinstance(part, str) else part["text"] for part in content)
        elif content is None:
            message["content"] = ""
        elif not isinstance(content, str):
            raise ValueError(f"messages[{number}].content: expected a text, got {content!r}.")
        if message.get("tool_calls"):
            message["tool_calls"] = [_normalize_call(call, number) for call in message["tool_calls"]]
        result.append(message)
    return result


def _normalize_call(call: Any, number: int) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        call = call.to_openai()
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"messages[{number}].tool_calls: expected a function's name and arguments, got {call!r}.")
    function = {**function, "arguments": _arguments(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else function


# ---- ReAct: how the first Qwen is told of tools and calls them ----


def react_instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text that describes `tools` to the first Qwen; it stands before the question.

    Args:
        tools: OpenAI-style definitions, or upstream's own with `name_for_model`, `name_for_human`,
            `description_for_model` and `parameters`.
    """
    names, texts = [], []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name_for_model", function.get("name"))
        if not isinstance(name, str) or not name:
            raise ValueError(f"tools[{number}]: expected a function definition with a name, got {tool!r}.")
        names.append(name)
        texts.append(
            _REACT_TOOL.format(
                name=name,
                human_name=function.get("name_for_human", name),
                description=function.get("description_for_model", function.get("description", "")),
                parameters=json.dumps(function.get("parameters", {}), ensure_ascii=False),
            )
        )
    return _REACT_INSTRUCTION.format(tools="\n\n".join(texts), names=", ".join(names))


def react_turns(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[list[tuple[str, str]], bool]:
    """Messages with tools, tool calls and their results as plain turns in the ReAct format.

    A result becomes an "Observation:" inside the assistant's own turn. As upstream does, the instruction stands before
    the question of the last finished turn (of the only one when there is no other), and plain answers get the words
    that lead to a final answer.

    Args:
        messages: normalized; `tool` (or `function`) messages follow the assistant message that made the call.
        tools: definitions; None when they are gone but the conversation still has results of theirs.
    Returns: (turns as (role, content); whether the last one is an assistant's turn to be continued after a result).
    Raises: ValueError for a result without a call, a call without a result, or an assistant's turn without a question.
    """
    turns: list[tuple[str, str]] = []
    open_turn = False  # the last turn is an assistant's that ended in results
    number = 0
    while number < len(messages):
        message = messages[number]
        role, content = message["role"], _stripped(message)
        if role in ("tool", "function"):
            raise ValueError(f"messages[{number}]: a tool result needs the call before it, found {role!r} alone.")
        if role != "assistant":
            turns.append((role, content))
            open_turn = False
            number += 1
            continue
        if not any(turn_role == "user" for turn_role, _ in turns):
            raise ValueError(f"messages[{number}]: an assistant's turn needs a user's question before it.")
        calls: list[Mapping[str, Any]] = [*(message.get("tool_calls") or ())]
        if message.get("function_call"):
            calls.append(_normalize_call(message["function_call"], number))
        end = number + 1
        while calls and end < len(messages) and messages[end]["role"] in ("tool", "function"):
            end += 1
        results = messages[number + 1 : end]
        if len(results) != len(calls) and not (end == len(messages) and not results):
            raise ValueError(
                f"messages[{number}]: {len(calls)} tool calls but {len(results)} results; "
                "each call needs its `tool` message right after it."
            )
        text = _assistant_text(content, calls, results, bool(tools))
        if open_turn:
            turns[-1] = ("assistant", f"{turns[-1][1]}\n{text}")
        else:
            turns.append(("assistant", text))
        open_turn = bool(results)
        number = end
    if tools:
        _insert_instruction(turns, react_instruction(tools))
    if open_turn:
        turns[-1] = ("assistant", turns[-1][1] + "\nThought:")
    return turns, open_turn


def _stripped(message: Message) -> str:
    return message["content"].lstrip("\n").rstrip()  # as in training; upstream's code marks it as important


def _assistant_text(
    content: str, calls: Sequence[Mapping[str, Any]], results: Sequence[Message], with_tools: bool
) -> str:
    if not calls:
        formatted = "Final Answer:" in content or content.startswith("Thought:")
        return _REACT_ANSWER + content if with_tools and not formatted else content
    by_id = {result.get("tool_call_id"): result for result in results}
    lines = []
    for place, call in enumerate(calls):
        thought = "" if place else content.removeprefix("Thought:").lstrip(" ")
        function = call.get("function", call)
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        lines += [f"Thought: {thought}", f"Action: {function['name']}", f"Action Input: {arguments}"]
        if results:
            known = call.get("id") is not None and call["id"] in by_id
            lines.append(f"Observation: {_stripped(by_id[call['id']] if known else results[place])}")
    return "\n".join(lines)


def _insert_instruction(turns: list[tuple[str, str]], instruction: str) -> None:
    questions = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not questions:
        raise ValueError("messages: tools need a user's question, found none.")
    answered = [i for i in questions if i + 1 < len(turns) and turns[i + 1][0] == "assistant"]
    place = (answered or questions)[-1]
    turns[place] = ("user", f"{instruction}\n\nQuestion: {turns[place][1]}")


def _parse_react(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The last complete action of a ReAct answer, or the final answer's text."""
    body = "\n" + text.split(f"\n{REACT_STOP}")[0] if f"\n{REACT_STOP}" in text else "\n" + text
    action, given = body.rfind("\nAction:"), body.rfind("\nAction Input:")
    if 0 <= action < given:
        name = body[action + len("\nAction:") : given].strip()
        raw = body[given + len("\nAction Input:") :].strip()
        if name:
            thought = body[:action].strip()
            return thought.removeprefix("Thought:").strip(), (ToolCall(name, _arguments(raw)),)
    _, found, answer = body.rpartition("\nFinal Answer:")
    return (answer.strip() if found else text), ()
