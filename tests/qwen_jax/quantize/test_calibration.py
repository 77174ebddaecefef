"""Calibration files: what becomes a row, and errors that name the file's line."""

import json

import numpy as np
import pytest

from qwen_jax.quantize.calibration import read_calibration


class Letters:
    """One id a character; a conversation is role initials and texts."""

    def encode(self, text):
        return [ord(each) % 1000 for each in text]

    def apply_chat_template(self, messages, add_generation_prompt=True):
        assert not add_generation_prompt
        if len(messages) == 9:
            raise ValueError("roles do not alternate")
        return self.encode("".join(f"<{each['role'][0]}>{each['content']}" for each in messages))


def read(tmp_path, name, content, **options):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_calibration(file, Letters(), **options)


def texts(rows):
    return ["".join(map(chr, row)) for row in rows]


def test_conversations_of_every_spelling(tmp_path):
    qwen = {"id": "x", "conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]}
    openai = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}
    entries = [qwen, openai, {"text": "plain"}]
    for name, content in (
        ("a.json", json.dumps(entries, indent=1)),
        ("a.jsonl", "\n".join(map(json.dumps, entries)) + "\n\n"),
    ):
        rows = read(tmp_path, name, content)
        assert texts(rows) == ["<u>hi<a>ho", "<s>s<u>hi", "plain"]
        assert all(row.dtype == np.int32 for row in rows)
    assert texts(read(tmp_path, "one.json", json.dumps(qwen))) == ["<u>hi<a>ho"]
    assert texts(read(tmp_path, "cut.json", json.dumps(entries), length=4)) == ["<u>h", "<s>s", "plai"]


def test_text_is_taken_evenly(tmp_path):
    rows = read(tmp_path, "a.txt", "abcdefghijklmnopqrst", rows=2, length=3)
    assert texts(rows) == ["abc", "jkl"]
    assert texts(read(tmp_path, "short.txt", "ab", length=8)) == ["ab"]
    assert texts(read(tmp_path, "bom.txt", b"\xef\xbb\xbfabc", length=3)) == ["abc"]


GOOD = '{"text": "fine"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '\n{"text": }\n', "a.jsonl: line 2: is not JSON"),
        ("a.json", f"[\n{GOOD},\n{GOOD}\n{GOOD}]", "a.json: line 4: the list is not closed"),
        ("a.json", f'[\n{GOOD},\n\n{{"text": }}]', "a.json: line 4: is not JSON"),
        ("a.json", f"[\n{GOOD},\n7]", "a.json: line 3: is int, expected an object"),
        ("a.jsonl", GOOD + '\n\n{"question": 1}', r"a.jsonl: line 3: has \['question'\], expected 'conversations'"),
        ("a.jsonl", '{"messages": []}', "line 1: messages is '\\[\\]', expected a list"),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', "line 1: role is 'robot', expected one of"),
        ("a.jsonl", '{"conversations": [{"from": "user"}]}', "line 1: value is 'None', expected a text"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}] * 9}), "line 1: roles do not alternate"),
        ("a.txt", b"good\nbad \xff", "a.txt: line 2: is not UTF-8"),
        ("a.txt", "", "holds no calibration text"),
        ("a.json", "[]", "holds no calibration text"),
        ("a.jsonl", "\n\n", "holds no calibration text"),
        ("a.json", "", "holds no calibration text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_bad_numbers(tmp_path):
    with pytest.raises(ValueError, match="0 rows of 512"):
        read(tmp_path, "a.txt", "abc", rows=0)
