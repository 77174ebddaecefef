"""Quantization settings: where they live, which module they speak of, what is refused."""

import json
import logging

import pytest

from qwen_jax.config import QuantizationConfig
from qwen_jax.errors import CheckpointError
from tests.edited import GOLDEN, edited

AUTOGPTQ = json.loads((GOLDEN / "qwen1-int4-g32/quantized/quantize_config.json").read_text())
GPTQMODEL = json.loads((GOLDEN / "qwen3-gptqmodel-int4-g32-dynamic-tied/quantized/quantize_config.json").read_text())
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
LLM_COMPRESSOR = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
    "version": "0.12.2",
    "sparsity_config": {},
    "transform_config": {},
}


def read(raw, **changes):
    return QuantizationConfig.from_dict(raw | changes, "folder/quantize_config.json")


def test_golden_settings():
    config = read(AUTOGPTQ)
    assert (config.method, config.bits, config.group_size, config.sym) == ("gptq", 4, 32, True)
    assert config.checkpoint_format == "gptq" and config.desc_act is False and config.quantizer == ""
    assert read(GPTQMODEL).quantizer == "gptqmodel:7.7.0"


def test_everything_but_bits_and_group_size_has_a_default():
    config = read({"bits": 4, "group_size": 128, "quant_method": "gptq"})
    assert (config.sym, config.desc_act, config.checkpoint_format, config.lm_head) == (None, None, "gptq", False)


def test_which_modules():
    config = read(AUTOGPTQ)
    assert config.for_module("transformer.h.0.attn.c_attn").bits == 4
    assert config.for_module("lm_head") is None and config.for_module("transformer.wte") is None
    assert read(AUTOGPTQ, lm_head=True).for_module("lm_head").bits == 4


def test_dynamic_rules():
    rules = {r"+:.*\.1\.self_attn\.q_proj": {"bits": 8, "group_size": 64}, r".*\.up_proj": {"group_size": -1}}
    rules |= {r".*\.0\.mlp.*": {"bits": 8}, r"-:.*\.0\.mlp\.down_proj": {}}
    config = read(AUTOGPTQ, dynamic=rules)

    def found(name):
        settings = config.for_module(f"model.layers.{name}")
        return settings and (settings.bits, settings.group_size)

    assert found("1.self_attn.q_proj") == (8, 64) and found("11.self_attn.q_proj") == (4, 32)
    assert found("1.mlp.up_proj") == (4, -1)
    assert found("0.mlp.down_proj") is None  # exclusions go first, wherever they stand
    assert found("0.mlp.up_proj") == (4, -1)  # then the first rule that matches, alone
    assert "dynamic '+:" in config.for_module("model.layers.1.self_attn.q_proj").rule


def test_an_escaped_prefix_is_part_of_the_expression_and_matches_nothing():
    # GPTQModel 7.7 wrote the golden case with such rules and, by its own reading, applied none of them.
    config = read(GPTQMODEL)
    assert config.for_module("model.layers.1.self_attn.v_proj").bits == 4
    names = [f"model.layers.{n}.{m}" for n in range(3) for m in ("mlp.down_proj", "mlp.gate_proj", "self_attn.v_proj")]
    assert [rule[:3] for rule in config.unused_rules(names)] == ["\\+:", "\\+:"]


def test_modules_named_in_lists():
    inside = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]
    config = read(AUTOGPTQ, modules_in_block_to_quantize=inside)
    assert config.for_module("model.layers.0.mlp.up_proj") and not config.for_module("model.layers.0.mlp.down_proj")
    config = read(AUTOGPTQ, modules_to_not_convert=["model.layers.1", "down_proj"])
    assert config.for_module("model.layers.10.mlp.up_proj") and not config.for_module("model.layers.1.mlp.up_proj")
    assert not config.for_module("model.layers.0.mlp.down_proj")


def test_compressed_tensors_targets():
    config = read(LLM_COMPRESSOR)
    assert (config.method, config.checkpoint_format, config.bits, config.group_size) == (
        "compressed-tensors",
        "pack-quantized",
        4,
        128,
    )
    assert config.for_module("model.layers.0.mlp.up_proj").sym and config.for_module("lm_head") is None
    assert config.for_module("model.embed_tokens") is None  # "Linear" is a class, and the embedding of another
    channel = {"targets": ["re:.*down_proj$"], "weights": WEIGHTS | {"strategy": "channel", "num_bits": 8}}
    groups = {"a": channel, "b": LLM_COMPRESSOR["config_groups"]["group_0"]}
    config = read(LLM_COMPRESSOR, config_groups=groups, ignore=["re:.*layers\\.1\\..*"])
    assert config.for_module("model.layers.0.mlp.down_proj").bits == 8
    assert config.for_module("model.layers.0.mlp.down_proj").group_size == -1
    assert config.for_module("model.layers.0.mlp.up_proj").bits == 4
    assert config.for_module("model.layers.1.mlp.up_proj") is None


def test_settings_live_in_either_file(tmp_path):
    case = "qwen1-int4-g32"
    folder = edited(case, tmp_path / "a")
    (folder / "quantize_config.json").unlink()
    assert QuantizationConfig.from_folder(folder) == read(AUTOGPTQ)
    folder = edited(case, tmp_path / "b", config={"quantization_config": None})
    assert QuantizationConfig.from_folder(folder) == read(AUTOGPTQ)
    assert QuantizationConfig.from_folder(GOLDEN / case / "source") is None


@pytest.mark.parametrize(("key", "value"), [("group_size", 64), ("bits", 8), ("checkpoint_format", "gptq_v2")])
def test_two_files_that_disagree_are_an_error(tmp_path, key, value):
    folder = edited("qwen1-int4-g32", tmp_path, quantize={"checkpoint_format": "gptq"})
    raw = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(CheckpointError, match=f"quantize_config.json: {key} is {value!r} but .*config.json"):
        QuantizationConfig.from_folder(folder)


def test_two_files_that_disagree_about_what_the_tensors_say_are_logged(tmp_path, caplog):
    folder = edited("qwen1-int4-g32", tmp_path)
    raw = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(raw | {"desc_act": True}))
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        QuantizationConfig.from_folder(folder)
    assert "desc_act is True but False" in caplog.text and "the tensors decide" in caplog.text


def group(**changes):
    return {"config_groups": {"g": LLM_COMPRESSOR["config_groups"]["group_0"] | changes}}


REFUSED = [
    (AUTOGPTQ, {"bits": 5}, "bits is 5, expected one of 2, 3, 4, 8"),
    (AUTOGPTQ, {"bits": None}, "bits is missing"),
    (AUTOGPTQ, {"group_size": 0}, "group_size is 0, expected −1 or at least 1"),
    (AUTOGPTQ, {"quant_method": "awq"}, "quant_method is 'awq'"),
    (AUTOGPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    (AUTOGPTQ, {"is_marlin_format": True}, "is_marlin_format"),
    (AUTOGPTQ, {"pack_dtype": "int16"}, "pack_dtype"),
    (AUTOGPTQ, {"rotation": "hadamard"}, "rotation"),
    (AUTOGPTQ, {"adapter": {"name": "lora"}}, "adapter"),
    (AUTOGPTQ, {"new_trick": 1}, "unknown key new_trick=1"),
    (AUTOGPTQ, {"checkpoint_format": "gptq_p", "bits": 3}, "3 bits are not supported in checkpoint_format 'gptq_p'"),
    (AUTOGPTQ, {"dynamic": {"+:(": {}}}, "is not a regular expression"),
    (AUTOGPTQ, {"dynamic": {".*": {"bits": 6}}}, "dynamic '.*': bits is 6"),
    (AUTOGPTQ, {"dynamic": {".*": {"scale_bits": 6}}}, "dynamic '.*': unknown key scale_bits"),
    (AUTOGPTQ, {"dynamic": {".*": 8}}, "expected an object of settings"),
    (AUTOGPTQ, {"modules_in_block_to_quantize": [1]}, "expected names of modules"),
    (LLM_COMPRESSOR, {"format": "float-quantized"}, "format is 'float-quantized', expected 'pack-quantized'"),
    (LLM_COMPRESSOR, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (LLM_COMPRESSOR, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (LLM_COMPRESSOR, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    (LLM_COMPRESSOR, {"config_groups": {}}, "config_groups is empty"),
    (LLM_COMPRESSOR, {"ignore": ["re:("]}, "is not a regular expression"),
    (LLM_COMPRESSOR, group(input_activations={"num_bits": 8}), "input_activations"),
    (LLM_COMPRESSOR, group(weights=WEIGHTS | {"type": "float"}), "type is 'float', expected 'int'"),
    (LLM_COMPRESSOR, group(weights=WEIGHTS | {"strategy": "tensor"}), "strategy is 'tensor'"),
    (LLM_COMPRESSOR, group(weights=WEIGHTS | {"num_bits": 3}), "num_bits is 3"),
    (LLM_COMPRESSOR, group(weights=WEIGHTS | {"group_size": None}), "group_size is missing"),
    (LLM_COMPRESSOR, group(surprise=1), "surprise"),
]


@pytest.mark.parametrize(("raw", "changes", "message"), REFUSED, ids=[f"{c}"[1:60] for _, c, _ in REFUSED])
def test_refused(raw, changes, message):
    with pytest.raises(CheckpointError) as caught:
        read(raw, **changes)
    assert str(caught.value).startswith("folder/quantize_config.json") and message in str(caught.value)
