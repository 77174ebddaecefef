"""Generation: stopping, trimming, padding ids, errors, caches; mostly on successor models, whose answer is known."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import AutoTokenizer, QwenForCausalLM, generation
from qwen_jax.errors import ConsumedCacheError, NonFiniteLogitsError
from qwen_jax.generation import bucket
from tests.qwen_jax.test_golden import GOLDEN, golden, load, relative_error
from tests.successor import ENDOFTEXT, IM_END, NEWLINE, VOCAB_SIZE, write_successor

QWEN2 = "qwen2-int4-per-channel"


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory):
    """Answers ABCDEFGHIJK, then <|im_end|>."""
    folder = write_successor(
        tmp_path_factory.mktemp("alphabet"), "ABCDEFGHIJK", generation_config={"eos_token_id": IM_END}
    )
    return QwenForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def edited(case, kind, folder, **keys):
    """A copy of a golden folder with keys of config.json (or generation_config.json: `generation`) changed."""
    shutil.copytree(GOLDEN / case / kind, folder)
    if "generation" in keys:
        (folder / "generation_config.json").write_text(json.dumps(keys.pop("generation")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def test_buckets_are_few_and_tight():
    sizes = [bucket(length) for length in range(1, 5000)]
    assert all(size >= length for length, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * length for length, size in enumerate(sizes, 1) if length > 16)
    assert len(set(sizes)) < 20


@pytest.mark.parametrize("chunk", [1, 3, 8, 32])
def test_stop_string_across_tokens_and_chunks(alphabet, chunk):
    model, tokenizer = alphabet
    out = model.generate(
        [[NEWLINE]], max_new_tokens=20, stop_strings="DEFGHIJ", tokenizer=tokenizer, logprobs=True, chunk=chunk
    )
    assert out.tokens == [list(b"ABC")]
    assert len(out.logprobs[0]) == 3
    assert out.sequences.tolist() == [[NEWLINE, *b"ABC"]]


def test_stop_token_ends_a_row_and_pads_it(alphabet):
    model, _ = alphabet
    ids = [[NEWLINE], [ord("J")]]
    out = model.generate(ids, max_new_tokens=20, pad_token_id=0, return_dict=True)
    assert out.tokens == [[*b"ABCDEFGHIJK", IM_END], [ord("K"), IM_END]]
    assert out.sequences[1].tolist() == [ord("J"), ord("K"), IM_END] + [0] * 10


@pytest.mark.parametrize("chunk, limit", [(1, 30), (3, 30), (3, 7), (8, 9)])
def test_chunks_given_ahead_are_those_given_one_by_one(alphabet, monkeypatch, chunk, limit):
    """An accelerator gets the next chunk before the last one is read, a CPU after it."""
    model, _ = alphabet
    ids = [[NEWLINE], [ord("J")]]
    want = list(model.stream(ids, max_new_tokens=limit, chunk=chunk))
    order = []
    dispatch, read = model._programs._chunk, generation._to_host
    monkeypatch.setattr(model._programs, "_chunk", lambda *a, **k: order.append("give") or dispatch(*a, **k))
    monkeypatch.setattr(generation, "_to_host", lambda out: order.append("read") or read(out))
    monkeypatch.setattr(generation, "default_chip", lambda: "NVIDIA H100 80GB HBM3")
    got = list(model.stream(ids, max_new_tokens=limit, chunk=chunk))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.tokens_BN, other.tokens_BN)
        np.testing.assert_array_equal(one.kept_BN, other.kept_BN)
    assert order[:2] == ["read", "give"] and ("give", "give") in zip(order, order[1:], strict=False) or limit < 10


@pytest.mark.parametrize("eos", [ord("D"), [ord("D"), ENDOFTEXT], [ENDOFTEXT, ord("D")]])
def test_generation_config_stops_number_or_list(tmp_path, eos):
    folder = write_successor(tmp_path / "model", "ABCDEFG", generation_config={"eos_token_id": eos})
    model = QwenForCausalLM.from_pretrained(folder)
    assert model.generate([[NEWLINE]], max_new_tokens=20).tolist() == [[NEWLINE, *b"ABCD"]]


def test_max_new_tokens_is_exact(alphabet):
    model, _ = alphabet
    for count in (1, 2, 5, 9, 10):
        assert model.generate([[NEWLINE]], max_new_tokens=count).shape == (1, 1 + count)


def test_logprobs_are_those_of_the_scored_sequence():
    model, ids = load(QWEN2, "gptq"), golden(QWEN2)["ids"]
    out = model.generate(ids, max_new_tokens=5, do_sample=True, temperature=0.7, eos_token_id=[], seed=3, logprobs=True)
    logits = np.asarray(model(out.sequences), np.float64)[:, ids.shape[1] - 1 : -1]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(logits, out.sequences[:, ids.shape[1] :, None], axis=2)[..., 0]
    np.testing.assert_allclose(out.logprobs, want, atol=1e-4)


def test_sampled_rows_are_those_of_single_runs():
    model, ids = load(QWEN2, "gptq"), golden(QWEN2)["ids"]
    settings = dict(max_new_tokens=8, do_sample=True, top_p=0.9, temperature=1.5, eos_token_id=[], seed=11)
    both = model.generate(ids, **settings)
    for row in range(2):
        np.testing.assert_array_equal(both[row], model.generate(ids[row : row + 1], **settings)[0])
    assert not np.array_equal(both, model.generate(ids, **{**settings, "seed": 12}))


def test_no_id_means_padding_without_a_mask(tmp_path):
    ids = golden(QWEN2)["ids"]
    token = int(ids[0, 3])
    folder = edited(QWEN2, "quantized", tmp_path / "model", generation=dict(pad_token_id=token, eos_token_id=token))
    model = QwenForCausalLM.from_pretrained(folder, dtype="float32")
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict=True)
    for row in range(2):
        want = golden(QWEN2)["gptq_greedy"][row].tolist()
        want = want[: want.index(token) + 1] if token in want else want
        assert out.tokens[row] == want


def test_overflow_is_an_error_not_exclamation_marks(tmp_path):
    folder = edited(QWEN2, "source", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name, factor in {"gate_proj": 512, "up_proj": 512, "down_proj": 1 / 64}.items():
        tensors[f"model.layers.0.mlp.{name}.weight"] *= np.float32(factor)
    save_file(tensors, folder / "model.safetensors")
    ids = golden(QWEN2)["ids"]
    model = QwenForCausalLM.from_pretrained(folder, dtype="float16")
    logits = np.asarray(model(ids))
    if np.isfinite(logits).all():
        assert relative_error(logits, QwenForCausalLM.from_pretrained(folder, dtype="float32")(ids)) < 2e-2
    else:
        with pytest.raises(NonFiniteLogitsError, match="step 0 of row 0.*bfloat16"):
            model.generate(ids, max_new_tokens=4)


def test_a_cache_is_used_once():
    model, ids = load(QWEN2, "gptq"), golden(QWEN2)["ids"]
    logits, cache = model.prefill(ids)
    token = np.asarray(logits).argmax(-1)
    first, _ = model.decode(token, cache)
    with pytest.raises(ConsumedCacheError, match="already consumed"):
        model.decode(token, cache)
    _, cache = model.prefill(ids)
    again, _ = model.decode(token, cache)
    np.testing.assert_array_equal(first, again)


def test_an_error_leaves_the_model_usable():
    model, ids = load(QWEN2, "gptq"), golden(QWEN2)["ids"]
    before = model.generate(ids, max_new_tokens=4, eos_token_id=[])
    stream = model.stream(ids, max_new_tokens=40, eos_token_id=[])
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="token id 384, expected 0 to 383"):
        model.generate([[1, 384]])
    _, cache = model.prefill(ids)
    with pytest.raises(ValueError, match="shape"):
        model.decode(np.zeros((1, 1), int), cache)
    model.decode(np.zeros((2, 1), int), cache)
    np.testing.assert_array_equal(before, model.generate(ids, max_new_tokens=4, eos_token_id=[]))


def test_the_last_id_of_the_vocabulary_is_accepted(alphabet):
    model, _ = alphabet
    assert model.generate([[VOCAB_SIZE - 1]], max_new_tokens=2).shape == (1, 3)


@pytest.mark.parametrize(
    "ids, settings, message",
    [
        ([[]], {}, "input_ids: shape .*at least one token"),
        ([[1.5]], {}, "input_ids: dtype float64, expected integers"),
        ([[-1]], {}, "input_ids: token id -1, expected 0 to 383"),
        ([[1] * 256], {}, "input_ids: 256 tokens leave no room.*holds 256"),
        ([[1, 2]], dict(attention_mask=[[0, 0]]), "attention_mask: row 0 is all zeros"),
        ([[1, 2, 3]], dict(attention_mask=[[1, 0, 1]]), "attention_mask: a row has zeros between ones"),
        ([[1, 2, 3]], dict(attention_mask=[[1, 1]]), "attention_mask: shape"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0: expected at least 1"),
        ([[1]], dict(stop_strings="a"), "stop_strings: a tokenizer is needed"),
        ([[1]], dict(temperature=0.0), "temperature=0.0: expected"),
        ([[1]], dict(top_p=2.0), "top_p=2.0: expected"),
    ],
)
def test_bad_arguments_are_named(ids, settings, message):
    with pytest.raises(ValueError, match=message):
        load(QWEN2, "gptq").generate(ids, **settings)


def test_prompt_longer_than_the_cache():
    model = load(QWEN2, "gptq", max_length=16)
    with pytest.raises(ValueError, match="24 tokens, but the cache holds 16"):
        model.prefill(golden(QWEN2)["ids"])
    _, cache = model.prefill(golden(QWEN2)["ids"][:, :15])
    _, cache = model.decode(np.ones((2, 1), int), cache)
    with pytest.raises(ValueError, match="cache: full, it holds 16 tokens"):
        model.decode(np.ones((2, 1), int), cache)


@pytest.mark.parametrize("options, message", [
    (dict(dtype="int8"), "dtype='int8' is none of"),
    (dict(kernels="cuda"), "kernels='cuda' is none of"),
    (dict(lm_head="int4"), "lm_head='int4' is none of"),
    (dict(max_length=0), "max_length=0: expected at least 1"),
])  # fmt: skip
def test_bad_load_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        QwenForCausalLM.from_pretrained(GOLDEN / QWEN2 / "quantized", **options)
