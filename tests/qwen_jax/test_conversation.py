"""`chat` and `chat_stream` end to end, on successor models, whose answer is known to the byte."""

import pytest

from qwen_jax import AutoTokenizer, QwenForCausalLM
from tests.successor import ENDOFTEXT, FIRST_UNKNOWN, IM_END, write_successor


def make(folder, answer, **options):
    load = options.pop("load", {})
    write_successor(folder, answer, **options)
    return QwenForCausalLM.from_pretrained(folder, **load), AutoTokenizer.from_pretrained(folder)


def test_whole_characters_only(tmp_path):
    model, tokenizer = make(tmp_path / "model", "A😊é")
    for chunk in (1, 2, 5):
        texts = list(model.chat_stream(tokenizer, "?", chunk=chunk))
        assert set(texts) <= {"", "A", "A😊", "A😊é"} and texts[-1] == "A😊é"
    for new in range(1, 6):
        cut = list(model.chat_stream(tokenizer, "?", max_new_tokens=new))
        assert cut[-1] == model.chat(tokenizer, "?", max_new_tokens=new)[0]
        assert "�" not in cut[-1]


def test_a_genuine_replacement_character_arrives(tmp_path):
    model, tokenizer = make(tmp_path / "model", b"a\xef\xbf\xbdb")
    assert model.chat(tokenizer, "?")[0] == "a�b"


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_stop_words(tmp_path, chunk):
    model, tokenizer = make(tmp_path / "model", "ABCDEFGHIJK")
    texts = list(model.chat_stream(tokenizer, "?", stop_words="DEFGHIJ", chunk=chunk))
    assert all("ABC".startswith(text) for text in texts) and texts[-1] == "ABC"
    assert model.chat(tokenizer, "?", stop_words=["JKL"], chunk=chunk)[0] == "ABCDEFGHIJK"  # held back, then flushed


@pytest.mark.parametrize("end", [IM_END, ENDOFTEXT])
@pytest.mark.parametrize("eos", [None, ENDOFTEXT, [ENDOFTEXT]])
def test_chat_stops_at_both_ends_whatever_the_files_say(tmp_path, end, eos):
    generation = None if eos is None else {"eos_token_id": eos}
    model, tokenizer = make(tmp_path / "model", "xyz", end=end, generation_config=generation)
    assert model.chat(tokenizer, "?", max_new_tokens=20)[0] == "xyz"


def test_ids_unknown_to_the_tokenizer_have_no_text(tmp_path):
    model, tokenizer = make(tmp_path / "model", [ord("a"), FIRST_UNKNOWN, ord("b")])
    assert list(model.chat_stream(tokenizer, "?", chunk=1))[-1] == "ab"


def test_the_callers_history_is_left_alone(tmp_path):
    model, tokenizer = make(tmp_path / "model", "yes")
    history = [("a?", "b")]
    first, after = model.chat(tokenizer, "c?", history=history)
    again, _ = model.chat(tokenizer, "c?", history=history)
    assert history == [("a?", "b")] and first == again == "yes"
    assert after == [("a?", "b"), ("c?", "yes")] and after is not history


def test_long_histories_are_cut_and_impossible_prompts_named(tmp_path):
    model, tokenizer = make(tmp_path / "model", "yes", load=dict(max_length=120))
    answer, after = model.chat(tokenizer, "c?", history=[("x" * 30, "y" * 30)] * 8)
    assert answer == "yes" and len(after) == 9
    with pytest.raises(ValueError, match="system text and the latest question take .* but only 60 fit"):
        model.chat(tokenizer, "c?", system="s" * 200)


def test_messages(tmp_path):
    model, tokenizer = make(tmp_path / "model", "yes")
    messages = [{"role": "user", "content": "?"}]
    response, after = model.chat(tokenizer, messages=messages)
    assert response == "yes"
    assert after == [*messages, {"role": "assistant", "content": "yes"}] and len(messages) == 1


def test_bad_settings_are_named(tmp_path):
    model, tokenizer = make(tmp_path / "model", "yes")
    with pytest.raises(ValueError, match="temprature: unknown argument"):
        model.chat(tokenizer, "?", temprature=1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.chat(tokenizer, "?", max_new_tokens=0)
