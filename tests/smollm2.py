"""SmolLM2 for tests: its text, and the same model expressed as a first-generation Qwen."""

import json
import platform
import pydoc_data.topics
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# transformers, float16 weights, float32 arithmetic: first 8192 tokens of Python's own documentation, one <|im_start|>
# in front, in windows of 1024. The text differs by Python version.
REFERENCE_PERPLEXITY = {"3.11.7": 13.501, "3.12.1": 13.267, "3.13.0": 13.623}.get(platform.python_version())
TOKENS, WINDOW = 8192, 1024


def documentation_ids(tokenizer) -> list[int]:
    """The ids whose perplexity the references are."""
    text = "\n".join(pydoc_data.topics.topics.values())
    return [tokenizer.im_start_id, *tokenizer.encode(text[: 8 * TOKENS])[: TOKENS - 1]]


def write_qwen_v1(source: Path, target: Path) -> None:
    """The same model in the first generation's layout.

    Query, key and value are one matrix, each key/value head stands once for each query head, and the head is a tensor
    of its own. Dynamic NTK and log-n attention are on; they act beyond `seq_length` alone.
    """
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = load_file(source / "model.safetensors")

    def repeated(array: np.ndarray) -> np.ndarray:
        by_head = array.reshape(kv_heads, -1, *array.shape[1:])
        return np.repeat(by_head, heads // kv_heads, axis=0).reshape(-1, *array.shape[1:])

    written = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    for n in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{n}", f"transformer.h.{n}"
        for kind in ("weight", "bias"):
            query, key, value = (tensors[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv")
            written[f"{ours}.attn.c_attn.{kind}"] = np.concatenate([query, repeated(key), repeated(value)])
        for one, other in {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            written[f"{ours}.{one}.weight"] = tensors[f"{theirs}.{other}.weight"]
    target.mkdir()
    save_file(written, target / "model.safetensors")
    v1 = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": 2 * config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "kv_channels": config["hidden_size"] // heads,
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": config["rope_theta"],
        "rotary_pct": 1.0,
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (target / "config.json").write_text(json.dumps(v1))
