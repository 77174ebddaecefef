"""PEFT's adapters beside the weights: logits of PEFT itself, in prefill and decode, on one device and on meshes."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import peft
from qwen_jax import QwenForCausalLM
from qwen_jax.config import ModelConfig
from qwen_jax.errors import CheckpointError
from tests.edited import GOLDEN

CASES = sorted(folder.parent.name for folder in GOLDEN.glob("*/lora"))
LIMITS = {"adapter_float": 1e-4, "adapter_gptq": 2e-3}
KINDS = {"adapter_float": "source", "adapter_gptq": "quantized"}
SMALL = GOLDEN / "qwen2-int4-per-channel"
CONFIG = ModelConfig.from_folder(SMALL / "source")


def error(found, wanted):
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


def load(folder, **settings):
    return QwenForCausalLM.from_pretrained(folder, dtype="float32", **settings)


def mesh(shape):
    data, model = shape
    return jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: data * model])


@pytest.mark.parametrize("tag", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case, tag):
    folder = GOLDEN / case
    ids, wanted = np.load(folder / "golden.npz")["ids"], np.load(folder / "lora" / "lora.npz")[tag]
    model = load(folder / KINDS[tag], adapter=folder / "lora" / "adapter")
    assert error(model(ids), wanted) < LIMITS[tag]
    assert error(load(folder / KINDS[tag])(ids), wanted) > 0.1
    if tag == "adapter_float":
        return
    _, cache = model.prefill(ids[:, :-1])
    logits, _ = model.decode(ids[:, -1:], cache)
    assert error(logits[:, 0], wanted[:, -1]) < LIMITS[tag]


@pytest.mark.parametrize("shape", [(2, 3), (1, 4)])
@pytest.mark.parametrize("case", CASES)
def test_logits_on_a_mesh(case, shape):
    folder = GOLDEN / case
    ids, wanted = np.load(folder / "golden.npz")["ids"], np.load(folder / "lora" / "lora.npz")["adapter_gptq"]
    model = load(folder / "quantized", adapter=folder / "lora" / "adapter", mesh=mesh(shape))
    assert error(model(ids), wanted) < 1e-5


@pytest.mark.parametrize("shape", [None, (1, 2)])
def test_patterns_rslora_and_whole_modules(shape):
    """Ranks and alphas by module, one layer left out, head and last norm trained whole; PEFT 0.21's own logits."""
    folder = SMALL / "lora" / "peft_patterns"
    ids, wanted = np.load(SMALL / "golden.npz")["ids"], np.load(folder / "logits.npz")["logits"]
    model = load(SMALL / "source", adapter=folder, mesh=None if shape is None else mesh(shape))
    assert error(model(ids), wanted) < 1e-4


def test_a_new_adapter_changes_nothing():
    folder = SMALL / "lora" / "initial_adapter"
    ids = np.load(SMALL / "golden.npz")["ids"]
    plain, adapted = load(SMALL / "quantized"), load(SMALL / "quantized", adapter=folder)
    np.testing.assert_array_equal(plain(ids), adapted(ids))


def test_written_files_come_back(tmp_path):
    read = peft.read(SMALL / "lora" / "adapter", CONFIG)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft.write(tmp_path / "copy", read, CONFIG, base_model="base", targets=targets, rank=8, alpha=16)
    theirs = load_file(SMALL / "lora" / "adapter" / peft.WEIGHTS)
    ours = load_file(tmp_path / "copy" / peft.WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    settings = json.loads((tmp_path / "copy" / peft.CONFIG).read_text())
    original = json.loads((SMALL / "lora" / "adapter" / peft.CONFIG).read_text())
    for key in ("r", "lora_alpha", "peft_type", "task_type", "use_rslora", "bias", "modules_to_save", "use_dora"):
        assert settings[key] == original[key], key
    with pytest.raises(CheckpointError, match="is there already"):
        peft.write(tmp_path / "copy", read, CONFIG, base_model="base", targets=targets, rank=8, alpha=16)


def test_targets_are_each_family_s_own_names():
    v1 = ModelConfig.from_folder(GOLDEN / "qwen1-int4-g32" / "source")
    assert peft.target_names(v1) == ["c_attn", "attn.c_proj", "w2", "w1", "mlp.c_proj"]
    assert "layers.1.attention.qkv" in peft.chosen(v1, ["c_attn"])
    both = peft.chosen(v1, ["c_proj"])  # as PEFT matches: both projections of that name
    assert {"layers.0.attention.output", "layers.0.mlp.down"} <= set(both)
    with pytest.raises(ValueError, match="target modules: 'q_proj' is no projection of a qwen model, expected some of"):
        peft.chosen(v1, ["q_proj"])
    with pytest.raises(ValueError, match="modules_to_save: 'q_proj' is the end of none of"):
        peft.savable(CONFIG, ["q_proj"])
    # PEFT compares ends of names, so that "norm" is every norm
    assert peft.savable(CONFIG, ["model.norm"]) == ["final_norm.scale"]
    assert {"final_norm.scale", "layers.0.mlp_norm.scale"} < set(peft.savable(CONFIG, ["norm"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"some_future_key": {"x": 1}}, "some_future_key is"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"r": 4}, r"F32 \[8, \d+\], expected floats \[4, \d+\]"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a positive number"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(tmp_path, change, message):
    folder = shutil.copytree(SMALL / "lora" / "adapter", tmp_path / "adapter")
    settings = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=message):
        peft.read(folder, CONFIG)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    def edited(name, change):
        folder = shutil.copytree(SMALL / "lora" / "adapter", tmp_path / name)
        tensors = load_file(folder / peft.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / peft.WEIGHTS)
        return folder

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    folder = edited("half", lambda tensors: tensors.pop(key.format("B")))
    with pytest.raises(CheckpointError, match="q_proj has lora_A alone, expected lora_A and lora_B"):
        peft.read(folder, CONFIG)
    folder = edited("other", lambda tensors: tensors.update({key.format("magnitude"): np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match="1 tensors without a place"):
        peft.read(folder, CONFIG)
    with pytest.raises(CheckpointError, match="tensors without a place"):
        peft.read(SMALL / "lora" / "adapter", ModelConfig.from_folder(GOLDEN / "qwen1-int4-g32" / "source"))
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        peft.read(SMALL / "source", CONFIG)
    folder = shutil.copytree(SMALL / "lora" / "adapter", tmp_path / "pickled")
    (folder / peft.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        peft.read(folder, CONFIG)
