"""Two layers of a real model: default options against AutoGPTQ's own and against rounding, on other text."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import AutoTokenizer, QwenForCausalLM
from qwen_jax.evaluate.compare import Totals
from qwen_jax.quantize import QuantizeSettings, quantize
from qwen_jax.quantize.round_to_nearest import quantize_folder

pytest.importorskip("gguf")
LAYERS, TEXT, CALIBRATION = 2, 384, 3072


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from qwen_jax.demo.smollm2 import find_gguf, write_qwen2_folder

    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    write_qwen2_folder(find_gguf(), whole)
    for file in whole.iterdir():
        if file.suffix == ".json":
            (cut / file.name).write_bytes(file.read_bytes())
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    tensors = load_file(whole / "model.safetensors")

    def kept(name):
        return not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS

    save_file({name: tensor for name, tensor in tensors.items() if kept(name)}, cut / "model.safetensors")
    return cut


@pytest.mark.slow  # two quantizations of a real model; `test_layer_error_against_autogptqs_tensors` is quick
def test_better_options_pay_on_other_text(source, tmp_path):
    import pydoc_data.topics

    tokenizer = AutoTokenizer.from_pretrained(str(source))
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = np.asarray(tokenizer.encode(text[: 8 * TEXT]))[:TEXT]
    rows = np.asarray(tokenizer.encode(text[-8 * CALIBRATION :]))[-CALIBRATION:].reshape(-1, 256)
    plain = QuantizeSettings(group_size=64, group_aware=False, scale_search=False, propagation=0)
    quantize_folder(source, tmp_path / "rounded", group_size=64, symmetric=True)
    quantize(source, tmp_path / "plain", rows, plain, dtype="float32")
    quantize(source, tmp_path / "better", rows, QuantizeSettings(group_size=64), dtype="float32")
    exact = QwenForCausalLM.from_pretrained(source, dtype="float32")(ids[None])[0, :-1]
    divergence = {}
    for name in ("rounded", "plain", "better"):
        totals = Totals()
        logits_TV = QwenForCausalLM.from_pretrained(tmp_path / name, dtype="float32")(ids[None])[0, :-1]
        totals.add(exact, logits_TV, ids[1:])
        divergence[name] = totals.result(name, "float", 0).kl_divergence
    assert divergence["plain"] < 0.7 * divergence["rounded"]
    assert divergence["better"] < 0.85 * divergence["plain"]
