"""`TextStream`: whole characters, stop strings across tokens, ids trimmed with the text, equal for every chunking."""

import itertools
import random

import numpy as np
import pytest

from qwen_jax.text_stream import TextStream
from qwen_jax.tokenizer import AutoTokenizer
from tests.chat_folders import real_v1_tokenizer
from tests.successor import ENDOFTEXT, FIRST_UNKNOWN, IM_END, IM_START, write_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def run(stream, ids, chunk):
    """All texts along the way, the final one last."""
    texts = [stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return [*texts, stream.finish()]


def naive(text, stops):
    """The answer's text: one character after the other, until a stop string is complete."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


# ---- half a character ----


def test_a_character_appears_when_it_is_complete(tokenizer):
    stream = TextStream(tokenizer)
    texts = [stream.push(byte) for byte in "A😊é".encode()]
    assert texts == ["A", "A", "A", "A", "A😊", "A😊", "A😊é"] and stream.finish() == "A😊é"


def test_cut_inside_a_character(tokenizer):
    stream = TextStream(tokenizer)
    assert run(stream, list("A😊".encode())[:-1], 1)[-1] == "A"
    assert stream.token_count == 4  # the ids are the model's; only the text has no use for them


def test_genuine_replacement_character_and_invalid_bytes(tokenizer):
    assert run(TextStream(tokenizer), [0xEF, 0xBF, 0xBD, 66], 1) == ["", "", "\ufffd", "\ufffdB", "\ufffdB"]
    for ids in ([65, 0xFF, 66], [0xF0, 0x9F, 66], [0xC3, 0xC3, 0xA9], [0x80]):
        for chunk in (1, 2, 3):
            assert run(TextStream(tokenizer), ids, chunk)[-1] == tokenizer.decode(ids)


def test_random_bytes_equal_decode(tokenizer):
    rng = random.Random(0)
    some = list("é😊你\ufffdA".encode())
    for _ in range(300):
        ids = [rng.choice([*some, 0xFF, 0x80, 0xF0, IM_START, FIRST_UNKNOWN]) for _ in range(12)] + [65]
        whole = tokenizer.decode(ids)
        for chunk in (1, 3, 13):
            texts = run(TextStream(tokenizer), ids, chunk)
            assert texts[-1] == whole
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_control_tokens_and_unknown_ids_give_no_text(tokenizer):
    stream = TextStream(tokenizer)
    ids = [65, IM_START, FIRST_UNKNOWN, 319, 10**6, 66, ENDOFTEXT]
    assert run(stream, ids, 2)[-1] == "AB" and stream.token_count == len(ids)


# ---- stop strings ----


@pytest.mark.parametrize("chunk", range(1, 12))
def test_stop_across_tokens_and_chunks(tokenizer, chunk):
    stream = TextStream(tokenizer, "DEFGHIJ")
    texts = run(stream, list(b"ABCDEFGHIJK"), chunk)
    assert all("ABC".startswith(text) for text in texts) and texts[-1] == "ABC"
    assert (stream.token_count, stream.finish_reason, stream.stopped_by) == (3, "stop_string", "DEFGHIJ")


@pytest.mark.parametrize("chunk", range(1, 8))
def test_without_a_match_the_held_back_text_comes_at_the_end(tokenizer, chunk):
    stream = TextStream(tokenizer, ["DEFGHIJ"])
    ids = list(b"ABCDEFG")
    texts = run(stream, ids, chunk)
    assert texts[-2] == "ABC" and texts[-1] == "ABCDEFG"
    assert (stream.token_count, stream.finish_reason) == (7, "end")
    again = TextStream(tokenizer, ["DEFGHIJ"])
    assert run(again, list(b"ABCDEFX"), chunk)[-2] == "ABCDEFX"  # decided: no stop string begins here any more


def test_the_stop_completed_first_wins_for_every_chunking(tokenizer):
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choices("abcé😊", k=14))
        stops = ["".join(rng.choices("abcé😊", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ids, want = list(text.encode()), naive(text, stops)
        for chunk in (1, 2, 5, 50):
            stream = TextStream(tokenizer, stops)
            texts = run(stream, ids, chunk)
            assert texts[-1] == want and all(want.startswith(t) for t in texts), (text, stops, chunk)
            if stream.finish_reason == "stop_string":
                assert stream.token_count == len(want.encode())
                assert stream.stopped_by in stops


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_a_stop_inside_another(tokenizer, chunk):
    stream = TextStream(tokenizer, ["ABCDE", "CD", "BCD"])  # "CD" and "BCD" are complete before "ABCDE"
    assert run(stream, list(b"xABCDEF"), chunk)[-1] == "xA" and stream.stopped_by == "BCD"


def test_ids_cover_the_text_with_tokens_of_many_characters():
    tokenizer = real_v1_tokenizer()
    text = "The quick brown fox is quick.\nObservation: 你好😊 and more"
    ids = tokenizer.encode(text)
    for stop in ("Observation:", "ick", "ox is q", "\nObs", "好", "😊", "zzz", "The"):
        counts = set()
        for chunk in (1, 4, 100):
            stream = TextStream(tokenizer, [stop])
            final = run(stream, ids, chunk)[-1]
            assert final == text.split(stop)[0]
            counts.add(stream.token_count)
        (count,) = counts
        assert tokenizer.decode(ids[:count]).startswith(final)
        assert count == 0 or not tokenizer.decode(ids[: count - 1]).startswith(final)


def test_nothing_after_the_end_counts(tokenizer):
    stream = TextStream(tokenizer, ["B"], stop_token_ids=[IM_END])
    assert stream.push([65, 66, 67]) == "A" and stream.finished
    assert stream.push([68]) == "A" and stream.finish() == "A" and stream.token_count == 1


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_stop_tokens(tokenizer, chunk):
    stream = TextStream(tokenizer, ["BXC", "DE"], stop_token_ids=(ENDOFTEXT, IM_END))
    assert run(stream, [*b"ABX", IM_END, *b"DE"], chunk)[-1] == "ABX"  # the stop string beyond it never came
    assert (stream.token_count, stream.finish_reason, stream.stopped_by) == (3, "stop_token", IM_END)
    first = TextStream(tokenizer, ["B"], stop_token_ids=(IM_END,))
    assert run(first, [*b"ABC", IM_END], chunk)[-1] == "A" and first.finish_reason == "stop_string"
    half = TextStream(tokenizer, stop_token_ids=(IM_END,))
    assert run(half, [65, 0xF0, 0x9F, IM_END, 66], chunk)[-1] == "A"


def test_ids_of_all_kinds(tokenizer):
    stream = TextStream(tokenizer)
    stream.push(65)
    stream.push(np.int32(66))
    stream.push(np.array([67, 68]))
    assert stream.push([]) == stream.text == "ABCD"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [5]])
def test_errors(tokenizer, stops):
    with pytest.raises(ValueError, match="at least one character"):
        TextStream(tokenizer, stops)
