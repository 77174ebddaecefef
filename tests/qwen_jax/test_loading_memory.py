"""Memory of the host while a model is loaded: its share and one tensor, as the system tells processes of their own."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.qwen_jax.test_distributed import ENVIRONMENT, begin, ends, worker

LAYERS, D, F, HEADS, KV_HEADS, K, V = 4, 1024, 4096, 16, 4, 64, 16384
MATRICES = {
    "self_attn.q_proj": (D, HEADS * K), "self_attn.k_proj": (D, KV_HEADS * K), "self_attn.v_proj": (D, KV_HEADS * K),
    "self_attn.o_proj": (HEADS * K, D), "mlp.gate_proj": (D, F), "mlp.up_proj": (D, F), "mlp.down_proj": (F, D),
}  # fmt: skip
LARGEST = 2 * V * D  # bytes of the token table
MB = 1 << 20
# What Python and XLA take beside arrays: the second loading of the same model, nothing compiled, needs at most this.
SLACK = 16 * MB
# What is freed goes back to the system at once: else what the first loading left behind would hide the second's needs.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell a process its peak of memory"
)


def write_model(folder: Path) -> None:
    """Random Int4, groups of 128, 16-bit tables: 100 MB, two thirds of it the token table and the head."""
    random, tensors = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for matrix, (inputs, outputs) in MATRICES.items():
            tensors[f"{name}.{matrix}.qweight"] = random.integers(-(2**31), 2**31, (inputs // 8, outputs), np.int32)
            tensors[f"{name}.{matrix}.qzeros"] = np.full((inputs // 128, outputs // 8), 0x77777777, np.int32)
            tensors[f"{name}.{matrix}.scales"] = np.full((inputs // 128, outputs), 0.01, np.float16)
            tensors[f"{name}.{matrix}.g_idx"] = (np.arange(inputs) // 128).astype(np.int32)
            if matrix[-6] in "qkv":
                tensors[f"{name}.{matrix}.bias"] = np.zeros(outputs, np.float16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(D, np.float16)
    tensors["model.norm.weight"] = np.ones(D, np.float16)
    for table in ("model.embed_tokens", "lm_head"):
        tensors[f"{table}.weight"] = random.integers(0, 2**14, (V, D), np.uint16).view(ml_dtypes.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq"}
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": V,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "quantization_config": quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def status(field: str) -> int:
    """Bytes by which Linux describes this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) << 10


def peak_of(function) -> tuple[int, object]:
    """Bytes of memory beyond those before the call, at its highest, and the result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = function()
    return status("VmHWM") - before, result


# -- in the processes --------------------------------------------------------------------------------------------------


def load(folder, mesh):
    import jax

    from qwen_jax import QwenForCausalLM
    from qwen_jax.sharding import parse_mesh

    def one():
        where = None if mesh is None else parse_mesh(mesh)
        model = QwenForCausalLM.from_pretrained(folder, dtype="bfloat16", mesh=where)
        return jax.block_until_ready(jax.tree.leaves(model.decoder))

    one()  # compiles
    peak, leaves = peak_of(one)
    share = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return {"peak": peak, "share": share}


def measure(folder, mesh, path):
    import jax

    Path(f"{path}.{jax.process_index()}.json").write_text(json.dumps(load(folder, mesh)))


def convert_and_load(folder, path):
    from qwen_jax.checkpoint_store import convert

    convert(folder, f"{path}.first")
    found = {"convert": {"peak": peak_of(lambda: convert(folder, f"{path}.second"))[0], "share": 0}}
    found |= {str(mesh): load(folder, mesh) for mesh in (None, "1x8")}
    found["converted"] = load(f"{path}.second", "1x8")
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    convert_and_load(*sys.argv[1:])


# -- tests -------------------------------------------------------------------------------------------------------------


def test_a_host_holds_its_share_and_one_tensor(tmp_path):
    """Two processes of one device: each ends with a half of the model, and beside it never held more than its half of
    the largest tensor."""
    write_model(tmp_path / "model")
    call = worker("measure", str(tmp_path / "model"), "1x2", str(tmp_path / "out"))

    def command(coordinator, process):
        flag, code = call(coordinator, process)
        return [flag, code.replace("t.measure", "from tests.qwen_jax import test_loading_memory as m; m.measure")]

    done = ends(begin(command, JAX_NUM_CPU_DEVICES="1", **MALLOC), 200)
    assert [code for code, *_ in done] == [0, 0], done
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    for process in range(2):
        found = json.loads((tmp_path / f"out.{process}.json").read_text())
        assert 0.45 * whole < found["share"] < 0.55 * whole
        assert 0.9 * found["share"] < found["peak"] < found["share"] + LARGEST // 2 + SLACK


@pytest.mark.slow
def test_copies_do_not_grow_with_devices(tmp_path):
    """One process, one device or eight: the model and its largest tensor; as much to convert it."""
    write_model(tmp_path / "model")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.qwen_jax.test_loading_memory", str(tmp_path / "model"), str(out)]
    environment = ENVIRONMENT | MALLOC | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    found = json.loads(out.read_text())
    for what in ("None", "1x8", "converted"):
        assert 0.9 * whole < found[what]["share"] < 1.2 * whole
        # As read and as sent; here the host is the device, too, where that is packed anew.
        assert found[what]["peak"] < found[what]["share"] + 2 * LARGEST + SLACK, what
    assert found["convert"]["peak"] < whole + 2 * LARGEST + SLACK
