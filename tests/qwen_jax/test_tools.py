"""Tool calls out of answers, and the ReAct text of the first Qwen."""

import json

import pytest

from qwen_jax.tools import ToolCall, normalize_messages, parse_response, parse_tool_calls, react_instruction

WEATHER = ToolCall("weather", {"place": "Köln", "days": 2})
BLOCK = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln", "days": 2}}\n</tool_call>'


def test_one_call():
    assert parse_tool_calls(BLOCK) == [WEATHER]
    parsed = parse_response("Let me see.\n" + BLOCK)
    assert (parsed.content, parsed.thinking, parsed.tool_calls) == ("Let me see.", None, (WEATHER,))
    assert parse_response(" as it is\n").content == " as it is\n"
    assert WEATHER.to_openai("c1") == {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Köln", "days": 2}'},
    }


def test_several_calls_and_a_missing_closing_tag():
    other = '<tool_call>{"name": "now"}'
    assert parse_tool_calls(BLOCK + "\n" + other) == [WEATHER, ToolCall("now", {})]


def test_arguments_as_text():
    text = json.dumps({"name": "f", "arguments": '{"x": 1}'})
    assert parse_tool_calls(f"<tool_call>{text}</tool_call>") == [ToolCall("f", {"x": 1})]


@pytest.mark.parametrize("body", ["{", "[]", '{"arguments": {}}', '{"name": 5}', '{"name": "f", "arguments": [1]}', ""])
def test_what_is_no_call_stays_text(body):
    text = f"a <tool_call>{body}</tool_call> b"
    parsed = parse_response(text)
    assert parsed.tool_calls == () and parsed.content == text


def test_thinking_is_taken_apart_and_holds_no_calls():
    parsed = parse_response(f"<think>\nmaybe {BLOCK}\n</think>\n\nNo.")
    assert (parsed.content, parsed.thinking, parsed.tool_calls) == ("No.", f"maybe {BLOCK}", ())
    assert parse_response("still </think>\n\nyes").thinking == "still "  # the opening tag was part of the prompt
    cut = parse_response(f"<think>\nnot done {BLOCK}")
    assert (cut.content, cut.thinking, cut.tool_calls) == ("", f"not done {BLOCK}", ())


def test_messages_are_normalized_and_left_alone():
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
        {"role": "assistant", "content": None, "tool_calls": [call, ToolCall("g", {"y": 2})]},
    ]
    before = json.dumps(given, default=str)
    first, second = normalize_messages(given)
    assert first["content"] == "ab" and second["content"] == ""
    assert [each["function"]["arguments"] for each in second["tool_calls"]] == [{"x": 1}, {"y": 2}]
    assert json.dumps(given, default=str) == before


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "a"}, r"messages\[0\]: expected a dictionary with a role"),
        ("hello", r"messages\[0\]: expected a dictionary"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "only text parts"),
        ({"role": "user", "content": 5}, "content: expected a text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}, "expected a function's name"),
    ],
)
def test_messages_that_are_none(message, error):
    with pytest.raises(ValueError, match=error):
        normalize_messages([message])


def test_instruction_takes_both_kinds_of_definitions():
    openai = {"type": "function", "function": {"name": "f", "description": "Does é.", "parameters": {"type": "object"}}}
    upstream = {
        "name_for_model": "g",
        "name_for_human": "G tool",
        "description_for_model": "Does g.",
        "parameters": [{"name": "x"}],
    }
    text = react_instruction([openai, upstream])
    assert "f: Call this tool to interact with the f API. What is the f API useful for? Does é. Parameters: " in text
    assert "g: Call this tool to interact with the G tool API." in text and 'Parameters: [{"name": "x"}]' in text
    assert "should be one of [f, g]" in text and text.endswith("Begin!")
    with pytest.raises(ValueError, match=r"tools\[0\]: expected a function definition with a name"):
        react_instruction([{"description": "x"}])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('Thought: I look.\nAction: f\nAction Input: {"x": 1}\n', "I look.", (ToolCall("f", {"x": 1}),)),
        (
            'Action: f\nAction Input: {"x": 1}\nObservation: made up\nAction: g\nAction Input: {}',
            "",
            (ToolCall("f", {"x": 1}),),
        ),
        (" so\nAction: run\nAction Input:\n```py\n1 + 1\n```", "so", (ToolCall("run", "```py\n1 + 1\n```"),)),
        (" I know.\nFinal Answer: 42", "42", ()),
        ("Plain.", "Plain.", ()),
        ("Action: f", "Action: f", ()),
    ],
)
def test_react_answers(text, content, calls):
    parsed = parse_response(text, react=True)
    assert (parsed.content, parsed.tool_calls) == (content, calls)
