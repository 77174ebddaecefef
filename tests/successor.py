"""A *successor model*: a tiny float Qwen2 folder whose greedy answer is any chosen chain of distinct tokens.

Embeddings are the identity (hidden size = vocabulary size = 320), every layer projection is zero and the head is a
permutation, so the model sees its last token alone and answers with that token's successor. The tokenizer has one token
a byte (ids 0 to 255), `<|endoftext|>` 256, `<|im_start|>` 257 and `<|im_end|>` 258; ids 259 to 319 are unknown to it.
A text whose bytes do not repeat therefore becomes a chain of tokens, and what `chat` must return is known exactly.

    write_successor(tmp_path / "model", "A😊é")   # after a ChatML prompt, which ends in a newline, it answers A😊é
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE = 320
ENDOFTEXT, IM_START, IM_END = 256, 257, 258
FIRST_UNKNOWN = 259  # from here to VOCAB_SIZE - 1 the model has ids that the tokenizer has not
NEWLINE = 10  # the last token of a ChatML prompt: "<|im_start|>assistant\n"


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones stay, others are moved."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(256 + moved.index(byte)) for byte in range(256)]


def write_byte_tokenizer(folder: Path, tokenizer_config: dict[str, Any] | None = None) -> None:
    """Writes tokenizer.json (one token a byte, three control tokens) and tokenizer_config.json into `folder`."""
    control = {"<|endoftext|>": ENDOFTEXT, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(id=token, content=text, **flags) for text, token in control.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_alphabet())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **(tokenizer_config or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def successor_table(chain: Sequence[int]) -> np.ndarray:
    """A permutation of the vocabulary, int64 [VOCAB_SIZE], with table[chain[i]] == chain[i + 1].

    The tokens of `chain` must be distinct; what is left over is paired in rising order.
    """
    if len(set(chain)) != len(chain):
        raise ValueError(f"chain: the tokens of a chain must be distinct, got {list(chain)}.")
    table = np.full(VOCAB_SIZE, -1)
    table[list(chain[:-1])] = chain[1:]
    free = sorted(set(range(VOCAB_SIZE)) - set(chain[1:]))
    table[table < 0] = free
    return table


def write_successor(
    folder: Path,
    answer: str | bytes | Sequence[int],
    *,
    start: int = NEWLINE,
    end: int = IM_END,
    config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    layers: int = 1,
) -> Path:
    """Writes a float32 Qwen2 folder that answers `answer` and then `end` once its prompt ends in token `start`.

    Args:
        folder: made if it is missing.
        answer: text or bytes (one token a byte), or token ids; distinct, and without `start` and `end`.
        start: the token after which the answer begins; the default fits every ChatML prompt.
        end: the token after the answer.
        config: keys that replace or join those of config.json.
        generation_config: the keys of generation_config.json; the file is left out for None.
        tokenizer_config: keys that replace or join those of tokenizer_config.json.
        layers: number of decoder layers, all of which do nothing.
    Returns: `folder`.
    """
    ids = list(answer.encode()) if isinstance(answer, str) else list(answer)
    write_byte_tokenizer(folder, tokenizer_config)
    hidden, inner, head_dim = VOCAB_SIZE, 64, 32
    heads, kv_heads = hidden // head_dim, 2
    table = successor_table([start, *ids, end])
    tensors = {
        "model.embed_tokens.weight": np.eye(VOCAB_SIZE, dtype=np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": np.eye(VOCAB_SIZE, dtype=np.float32)[np.argsort(table)],  # row table[i] is one at column i
    }
    for n in range(layers):
        rows = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        for name, out_features in rows.items():
            tensors[f"model.layers.{n}.self_attn.{name}.weight"] = np.zeros((out_features, hidden), np.float32)
            tensors[f"model.layers.{n}.self_attn.{name}.bias"] = np.zeros(out_features, np.float32)
        tensors[f"model.layers.{n}.self_attn.o_proj.weight"] = np.zeros((hidden, heads * head_dim), np.float32)
        tensors[f"model.layers.{n}.mlp.gate_proj.weight"] = np.zeros((inner, hidden), np.float32)
        tensors[f"model.layers.{n}.mlp.up_proj.weight"] = np.zeros((inner, hidden), np.float32)
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] = np.zeros((hidden, inner), np.float32)
        tensors[f"model.layers.{n}.input_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"model.layers.{n}.post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": IM_END,
        "bos_token_id": None,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    return folder
