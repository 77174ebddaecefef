"""Features that no golden case shows: key biases under an 8-bit cache, sliding windows, YaRN, config fields."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import QwenForCausalLM
from qwen_jax.config import ModelConfig
from qwen_jax.kv_cache import bytes_per_token
from qwen_jax.rotary import attention_factor, dynamic_ntk_alpha, inverse_frequency
from tests.qwen_jax.test_golden import GOLDEN, decode_logits, golden, load, relative_error

QWEN2 = "qwen2-int4-per-channel"


def edited(folder, tensors=None, **keys):
    """A copy of the golden Qwen2 source with tensors changed by `tensors` and keys of config.json replaced."""
    shutil.copytree(GOLDEN / QWEN2 / "source", folder)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if tensors is not None:
        arrays = load_file(folder / "model.safetensors")
        tensors(arrays)
        save_file(arrays, folder / "model.safetensors")
    return folder


def large_key_biases(arrays):
    for layer in range(2):
        bias = arrays[f"model.layers.{layer}.self_attn.k_proj.bias"].reshape(4, 32)
        bias[:, [15, 31, 30]] += 300 * np.float32([1, -0.6, 0.4])


def test_large_key_biases_cost_the_8_bit_cache_nothing(tmp_path):
    ids, tokens = golden(QWEN2)["ids"], golden(QWEN2)["float_greedy"]
    errors = {}
    for name, change in {"plain": None, "biased": large_key_biases}.items():
        folder = edited(tmp_path / name, change)
        exact, rounded = (
            decode_logits(QwenForCausalLM.from_pretrained(folder, use_cache_quantization=q), ids, tokens)
            for q in (False, True)
        )
        errors[name] = relative_error(rounded, exact)
    assert 0 < errors["biased"] <= 2 * errors["plain"]


def test_bytes_per_token_are_true():
    for quantized in (False, True):
        model = load(QWEN2, "gptq", use_cache_quantization=quantized)
        _, cache = model.prefill(golden(QWEN2)["ids"])
        assert cache.nbytes_per_token == model.kv_bytes_per_token
    # 2 (key, value) · 2 layers · 4 heads · (32 bytes + scale + minimum)
    assert bytes_per_token(model.config, "float32", True) == 2 * 2 * 4 * (32 + 4)
    assert bytes_per_token(model.config, "bfloat16", False) == 2 * 2 * 4 * 64


def one_layer(folder, **keys):
    return QwenForCausalLM.from_pretrained(edited(folder, _drop_second_layer, num_hidden_layers=1, **keys))


def _drop_second_layer(arrays):
    for name in [name for name in arrays if ".layers.1." in name]:
        del arrays[name]


def test_sliding_window(tmp_path):
    ids = golden(QWEN2)["ids"][:1]
    full = np.asarray(one_layer(tmp_path / "full")(ids))
    unused = one_layer(tmp_path / "unused", use_sliding_window=False, sliding_window=8)
    np.testing.assert_array_equal(unused(ids), full)
    above = one_layer(tmp_path / "above", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    np.testing.assert_array_equal(above(ids), full)
    sliding = one_layer(tmp_path / "sliding", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    base, position = np.asarray(sliding(ids)), 20
    for distance, depends in [(7, True), (8, False), (9, False)]:
        changed = ids.copy()
        changed[0, position - distance] = (changed[0, position - distance] + 1) % 384
        assert np.array_equal(np.asarray(sliding(changed))[0, position], base[0, position]) != depends
    tokens = golden(QWEN2)["float_greedy"][:1]
    whole = np.asarray(sliding(np.concatenate([ids, tokens], 1)))[:, ids.shape[1] :]
    assert relative_error(decode_logits(sliding, ids, tokens), whole) < 1e-5


# transformers 5.24's `_compute_yarn_parameters` for head size 32, theta 1e6, factor 4, original length 64.
YARN_FACTOR = 1.138629436111989
YARN_FREQUENCIES = [
    1.0, 0.3162723779678345, 0.08891396969556808, 0.018747353926301003, 0.007905694656074047, 0.0033338037319481373,
    0.0014058533124625683, 0.0005928434547968209, 0.0002500000118743628, 0.00010542412201175466, 4.4456985051510856e-05,
    1.8747356079984456e-05, 7.905693564680405e-06, 3.3338035336782923e-06, 1.405853367941745e-06, 5.928434347879374e-07,
]  # fmt: skip
YARN_SPELLINGS = [
    dict(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    dict(
        rope_theta=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
]


@pytest.mark.parametrize("spelling", YARN_SPELLINGS)
def test_yarn(tmp_path, spelling):
    folder = edited(tmp_path / "yarn", **spelling)
    config = ModelConfig.from_folder(folder)
    assert attention_factor(config) == pytest.approx(YARN_FACTOR, rel=1e-12)
    np.testing.assert_allclose(inverse_frequency(config)[0], YARN_FREQUENCIES, rtol=1e-6)
    ids = golden(QWEN2)["ids"]
    plain, stretched = load(QWEN2, "float")(ids), QwenForCausalLM.from_pretrained(folder)(ids)
    assert relative_error(stretched, plain) > 1e-2


def test_dynamic_ntk_alpha_at_its_borders():
    # ceil(log2(length / 64) + 1): 64 → 1, 65 and 128 → 2, 129 → 3; alpha = 2^that − 1.
    lengths = np.int32([1, 64, 65, 128, 129, 256, 257, 512, 513])
    np.testing.assert_array_equal(dynamic_ntk_alpha(lengths, 64), [1, 1, 3, 3, 7, 7, 15, 15, 31])


CHANGES = {
    "norm_epsilon": 1e-2,
    "rope_theta": 1e6,
    "use_dynamic_ntk": True,
    "use_logn_attention": True,
    "sliding_window": 4,
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_matters(field):
    """A field that nothing reads would leave the logits as they are."""
    model, ids = load("qwen1-int8-g32", "float"), golden("qwen1-int8-g32")["long_ids"]
    off = dataclasses.replace(model.config, use_dynamic_ntk=False, use_logn_attention=False)
    changed = dataclasses.replace(off, **{field: CHANGES[field]})
    if field == "sliding_window":
        changed = dataclasses.replace(changed, sliding_layers=(True,) * changed.num_layers)
    results = [np.asarray(_with_config(config)(ids)) for config in (off, changed)]
    assert relative_error(results[1], results[0]) > 1e-4


def _with_config(config):
    from converters.huggingface import Checkpoint
    from qwen_jax.generation_config import GenerationConfig
    from qwen_jax.loading import CheckpointWeights
    from qwen_jax.model import Decoder

    checkpoint = Checkpoint(GOLDEN / "qwen1-int8-g32" / "source")
    checkpoint.config = config
    decoder = Decoder(config, CheckpointWeights(checkpoint, dtype="float32"), dtype="float32")
    return QwenForCausalLM(decoder, GenerationConfig.from_folder(checkpoint.folder))
