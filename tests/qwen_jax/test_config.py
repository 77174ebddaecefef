"""Configuration files: every key read, ignored by name, or refused."""

import json
import logging
import math

import pytest

from qwen_jax.config import MEANINGLESS, ModelConfig, YarnConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.generation_config import GenerationConfig
from tests.edited import CASES, GOLDEN

QWEN = json.loads((GOLDEN / "qwen1-int4-g32/source/config.json").read_text())
QWEN2 = json.loads((GOLDEN / "qwen2-int4-per-channel/source/config.json").read_text())
QWEN3 = json.loads((GOLDEN / "qwen3-gptqmodel-int4-g32-dynamic-tied/source/config.json").read_text())


def read(raw, **changes):
    raw = raw | changes
    return ModelConfig.from_dict({key: value for key, value in raw.items() if value is not ...})


def test_first_generation():
    config = read(QWEN)
    assert (config.family, config.intermediate_size, config.seq_length) == ("qwen", 192, 64)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 32, 10000.0)
    assert config.use_dynamic_ntk and config.use_logn_attention and config.attention_bias and not config.qk_norm
    assert config.sliding_layers == (False,) * 3


def test_first_release_spelled_its_config_like_gpt2():
    spelled = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    spelled |= {"intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size"}
    old = {spelled.get(key, key): value for key, value in QWEN.items()}
    assert read(old) == read(QWEN)


def test_newer_families():
    assert read(QWEN2).attention_bias and not read(QWEN2).qk_norm
    config = read(QWEN3)
    assert (config.family, config.head_dim, config.qk_norm, config.attention_bias) == ("qwen3", 48, True, False)
    assert config.tie_word_embeddings and config.eos_token_ids == (383,) and config.pad_token_id is None
    assert read(QWEN3, head_dim=...).head_dim == 128  # transformers' default, whatever hidden_size / heads is
    llama = {key: value for key, value in QWEN2.items() if "window" not in key}
    config = read(llama, model_type="llama", attention_bias=False, mlp_bias=False, pretraining_tp=1)
    assert (config.family, config.attention_bias) == ("qwen2", False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["source", "quantized"])
def test_golden_folders(case, kind):
    assert ModelConfig.from_folder(GOLDEN / case / kind).num_layers in (2, 3)


def test_keys_that_moved_in_transformers_5():
    moved = {"rope_theta": ..., "torch_dtype": ..., "dtype": "float32"}
    moved |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    assert read(QWEN2, **moved) == read(QWEN2)
    assert read(QWEN2, layer_types=["full_attention"] * 2, sliding_window=None) == read(QWEN2)


@pytest.mark.parametrize(
    ("raw", "name"), [(QWEN, "rotary_emb_base"), (QWEN2, "rope_theta"), (QWEN3, "rope_parameters")]
)
def test_missing_theta_is_the_documented_default_and_logged(raw, name, caplog):
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        assert read(raw, **{name: ...}).rope_theta == 10000.0
    assert "documented default, 10000" in caplog.text


def test_dtype_of_old_files():
    assert read(QWEN, torch_dtype=None, fp32=False, bf16=True).dtype == "bfloat16"
    assert read(QWEN2, torch_dtype="torch.float16").dtype == "float16"


def test_end_of_sequence_ids():
    assert read(QWEN2, eos_token_id=[5, 7]).eos_token_ids == (5, 7)
    assert read(QWEN2, eos_token_id=None).eos_token_ids == ()
    assert read(QWEN2, pad_token_id=-1).pad_token_id is None


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "rope_type": "yarn"}},
        {"rope_scaling": {key: value for key, value in YARN.items() if key != "type"} | {"rope_type": "yarn"}},
        {"rope_theta": ..., "rope_parameters": YARN | {"rope_theta": 1000000.0}},
    ],
    ids=["type", "both", "rope_type", "rope_parameters"],
)
def test_yarn_in_all_spellings(changes):
    config = read(QWEN2, **changes)
    assert config.yarn == YarnConfig(4.0, 64, 32.0, 1.0, 0.1 * math.log(4) + 1, True)
    assert config.rope_theta == 1000000.0


def test_yarn_details():
    def yarn(**changes):
        return read(QWEN2, rope_scaling=YARN | changes).yarn

    assert yarn(attention_factor=0.75).attention_factor == 0.75
    assert yarn(beta_fast=None, beta_slow=2).beta_slow == 2.0
    assert not yarn(truncate=False).truncate
    expected = (0.1 * 0.707 * math.log(4) + 1) / (0.1 * 0.5 * math.log(4) + 1)
    assert yarn(mscale=0.707, mscale_all_dim=0.5).attention_factor == pytest.approx(expected)
    assert yarn(mscale=0.707).attention_factor == pytest.approx(0.1 * math.log(4) + 1)  # one alone counts for nothing
    assert read(QWEN2, rope_scaling={"type": "yarn"}).yarn.factor == 1.0
    assert read(QWEN2, rope_scaling={"type": "yarn", "factor": 2.0}).yarn.original_max_position_embeddings == 256


def test_sliding_window():
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert read(QWEN2).sliding_window is None
    assert read(QWEN2, **used, max_window_layers=2).sliding_layers == (False, False)
    assert read(QWEN2, **used, max_window_layers=2).sliding_window is None
    assert read(QWEN2, **used, max_window_layers=1).sliding_layers == (False, True)
    assert read(QWEN2, **used, max_window_layers=0).sliding_window == 8
    kinds = ["sliding_attention", "full_attention"]
    assert read(QWEN2, **used, layer_types=kinds).sliding_layers == (True, False)


def test_meaningless_keys_change_nothing():
    assert read(QWEN2, **dict.fromkeys(MEANINGLESS - set(QWEN2), "anything")) == read(QWEN2)


# What a field may not be, and what the message says beside file and key.
REFUSED = [
    (QWEN2, {"model_type": "gpt2"}, "model_type is 'gpt2', expected one of qwen, qwen2, qwen3"),
    (QWEN2, {"model_type": ...}, "model_type is missing"),
    (QWEN2, {"model_type": "qwen3_moe"}, "not supported yet"),
    (QWEN2, {"model_type": "qwen2_moe"}, "mixture of experts"),
    (QWEN2, {"hidden_size": ...}, "hidden_size is missing"),
    (QWEN2, {"hidden_size": "128"}, "hidden_size is '128', expected int"),
    (QWEN2, {"hidden_size": True}, "hidden_size is True, expected int"),
    (QWEN2, {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected at least 1"),
    (QWEN2, {"hidden_size": 130}, "not a multiple of num_attention_heads"),
    (QWEN2, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    (QWEN2, {"head_dim": 33}, "head_dim is 33, expected an even number"),
    (QWEN2, {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    (QWEN2, {"mlp_bias": True}, "mlp_bias"),
    (QWEN2, {"use_mrope": True}, "use_mrope"),
    (QWEN2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (QWEN2, {"rms_norm_eps": 0}, "rms_norm_eps is 0.0, expected a number above 0"),
    (QWEN2, {"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
    (QWEN2, {"dtype": "bfloat16"}, "dtype is 'bfloat16' but torch_dtype"),
    (QWEN2, {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    (QWEN2, {"eos_token_id": [1, None]}, "eos_token_id holds None"),
    (QWEN2, {"final_logit_softcapping": 30.0}, "unknown key final_logit_softcapping=30.0"),
    (QWEN2, {"rope_scaling": {"type": "mystery"}}, "rope type is 'mystery'"),
    (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear', expected 'default' or 'yarn'"),
    (QWEN2, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    (QWEN2, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    (QWEN2, {"rope_scaling": {"type": "default", "mrope_section": [16]}}, "mrope_section"),
    (QWEN2, {"rope_scaling": YARN | {"rope_type": "default"}}, "rope_type is 'default' but type"),
    (QWEN2, {"rope_scaling": YARN | {"low_freq_factor": 1.0}}, "low_freq_factor"),
    (QWEN2, {"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5, expected at least 1"),
    (QWEN2, {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 1e+06 but 5 inside"),
    (QWEN2, {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "another spelling"),
    (QWEN2, {"layer_types": ["full_attention"]}, "layer_types holds 1 entries"),
    (QWEN2, {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is False"),
    (QWEN3, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    (QWEN, {"rotary_pct": 0.25}, "rotary_pct is 0.25, expected 1.0"),
    (QWEN, {"scale_attn_weights": False}, "scale_attn_weights"),
    (QWEN, {"no_bias": False}, "no_bias"),
    (QWEN, {"intermediate_size": 385}, "twice the MLP's inner size"),
    (QWEN, {"kv_channels": 16}, "kv_channels × num_attention_heads is 16 × 4 = 64, expected hidden_size 128"),
    (QWEN, {"sliding_window": 8}, "sliding_window"),  # the first generation has none
]


@pytest.mark.parametrize(("raw", "changes", "message"), REFUSED, ids=[str(changes)[1:60] for _, changes, _ in REFUSED])
def test_refused(raw, changes, message):
    raw = {key: value for key, value in (raw | changes).items() if value is not ...}
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(raw, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json") and message in str(caught.value)


def test_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        ModelConfig.from_folder(tmp_path)


def test_generation_config(tmp_path):
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig()
    chat = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144}
    chat |= {"max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(chat | {"num_beams": 1, "transformers_version": "4"}))
    config = GenerationConfig.from_folder(tmp_path)
    assert config.eos_token_ids == (151643,) and config.max_window_size == 6144 and config.top_k == 0
    assert config.temperature is None and config.chat_format == "chatml"
    assert GenerationConfig.from_dict({"eos_token_id": [1, 2]}).eos_token_ids == (1, 2)
    assert GenerationConfig.from_dict({"stop_words_ids": [[1], [2, 3]]}).stop_words_ids == ((1,), (2, 3))


@pytest.mark.parametrize(
    "raw",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"do_sample": 1},
        {"eos_token_id": "im_end"},
        {"chat_format": "alpaca"},
        {"stop_words_ids": [1]},
        {"max_window_size": 0},
    ],
    ids=str,
)
def test_bad_generation_values_name_their_key(raw):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(raw))}"):
        GenerationConfig.from_dict(raw)
