"""What is learned of a conversation, how conversations are laid into rows, and what is said of bad ones."""

import json

import numpy as np
import pytest

from qwen_jax.finetune import collect, read_dataset
from qwen_jax.finetune.data import IGNORED, Example, assistant_tokens
from qwen_jax.finetune.rows import Rows, warmup_steps
from qwen_jax.tokenizer import AutoTokenizer
from tests.successor import IM_END, write_byte_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi<|im_start|>assistant\nno<|im_end|>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "\nSee you."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return AutoTokenizer.from_pretrained(folder)


def write(path, entries):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries, indent=1))
    return path


def learned_text(example, tokenizer):
    """What a model is asked to predict, in its order."""
    targets = example.targets_T
    return tokenizer.decode(targets[targets != IGNORED], skip_special_tokens=False)


def test_the_assistant_s_words_and_their_end_marks_are_learned(tmp_path, tokenizer):
    qwen = {"id": "x", "conversations": [{"from": m["role"], "value": m["content"]} for m in TALK]}
    for file in (write(tmp_path / "a.jsonl", [{"messages": TALK}]), write(tmp_path / "b.json", [qwen])):
        (example,) = read_dataset(file, tokenizer, 200).examples
        assert learned_text(example, tokenizer) == "Hello.<|im_end|>\nSee you.<|im_end|>"
        # each target is the next token
        at = np.flatnonzero(example.targets_T != IGNORED)
        np.testing.assert_array_equal(example.targets_T[at], example.ids_T[at + 1])


def test_text_is_learned_whole(tmp_path, tokenizer):
    (example,) = read_dataset(write(tmp_path / "a.jsonl", [{"text": "abc"}]), tokenizer, 10).examples
    assert example.ids_T.tolist() == [97, 98, 99, IM_END]
    assert example.targets_T.tolist() == [98, 99, IM_END, IGNORED]


def test_an_unfinished_turn_has_no_end_mark(tokenizer):
    ids = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=False)
    cut = ids[: ids.index(IM_END, ids.index(ord("H"), 60)) - 2]
    learned_T = assistant_tokens(cut, tokenizer)
    assert tokenizer.decode(np.asarray(cut)[learned_T]) == "Hell"


def test_long_conversations_are_cut_and_counted(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[1:3]}, {"messages": TALK[3:]}])
    whole = read_dataset(file, tokenizer, 500)
    sizes = [len(example.ids_T) for example in whole.examples]
    assert (whole.cut, whole.dropped) == (0, 0)
    cut = read_dataset(file, tokenizer, 60)
    assert cut.cut == sum(size > 60 for size in sizes)
    assert cut.cut_tokens == sum(max(size - 60, 0) for size in sizes)
    assert cut.dropped == 1  # the first one's answers come later
    assert all(len(example.ids_T) <= 60 for example in cut.examples)
    assert whole.digest() != cut.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}', r"a.jsonl: line 2: has no assistant's turn"),
        ('{"messages": [{"role": "narrator", "content": "a"}]}', r"a.jsonl: line 2: role is 'narrator'"),
        ('{"messages": [}', r"a.jsonl: line 2: is not JSON"),
        ('{"prompt": "a"}', r"a.jsonl: line 2: has \['prompt'\], expected 'conversations', 'messages' or 'text'"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, tokenizer, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=message):
        read_dataset(path, tokenizer, 100)


def test_a_file_of_another_kind_and_one_without_words(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="expected conversations in a .json or .jsonl file"):
        read_dataset(tmp_path / "a.txt", tokenizer, 100)
    with pytest.raises(ValueError, match=r"holds nothing to learn in rows of 5 tokens \(1 entries, 1 longer\)"):
        read_dataset(write(tmp_path / "a.jsonl", [{"messages": TALK}]), tokenizer, 5)


def numbered(sizes):
    """Examples whose ids tell which one they are of."""
    made = [Example(np.full(size, number + 1, np.int32), np.ones(size, bool)) for number, size in enumerate(sizes)]
    return collect(made, 32, "test")


SIZES = np.random.default_rng(0).integers(2, 32, 50).tolist()
COMMON = dict(length=32, batch_size=3, accumulate=2, max_steps=None, seed=1)


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_in_one_row_an_epoch(packing):
    rows = Rows(numbered(SIZES), packing=packing, epochs=2, **COMMON)
    batches = [rows.batch(step) for step in range(rows.steps)]
    counts = np.zeros(len(SIZES) + 1, int)
    for batch in batches:
        tokens = batch.ids > 0
        np.add.at(counts, batch.ids[tokens], 1)
        assert not (batch.targets[~tokens] != IGNORED).any()
        if packing:
            assert (tokens == (batch.segments > 0)).all()
            for row, segments, positions in zip(
                *(a.reshape(-1, 32) for a in (batch.ids, batch.segments, batch.positions)), strict=True
            ):
                for segment in range(1, segments.max() + 1):
                    inside = segments == segment
                    assert len(set(row[inside])) == 1  # one example
                    np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
        else:
            assert batch.segments is None
            np.testing.assert_array_equal(batch.lengths, np.maximum(tokens.sum(-1), 1))
    np.testing.assert_array_equal(counts[1:], 2 * np.asarray(SIZES))
    assert sum(batch.ids.size for batch in batches) * (1 - rows.padding) == pytest.approx(2 * sum(SIZES))
    assert rows.padding < (0.25 if packing else 0.5)


def test_rows_follow_from_seed_and_epoch():
    one, two = (Rows(numbered(SIZES), packing=True, epochs=2, **COMMON) for _ in range(2))
    other = Rows(numbered(SIZES), packing=True, epochs=2, **(COMMON | {"seed": 2}))
    assert all(np.array_equal(one.batch(step).ids, two.batch(step).ids) for step in range(one.steps))
    assert not np.array_equal(one.batch(0).ids, other.batch(0).ids)
    assert not np.array_equal(one.batch(0).ids, one.batch(one.steps // 2).ids)
    short = Rows(numbered(SIZES), packing=True, epochs=2, **(COMMON | {"max_steps": 2}))
    assert short.steps == 2


def test_warmup():
    assert [warmup_steps(*case) for case in ((0, 10), (0.03, 10), (0.5, 10), (3, 10), (30, 10))] == [0, 1, 5, 3, 10]
