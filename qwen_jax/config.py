"""`ModelConfig`: a model's architecture, read from its checkpoint's own config.json.

Each key of that file is read, listed as meaningless for inference, or refused; both the old spellings (`rope_theta`,
`rope_scaling`, `torch_dtype`) and those of transformers 5 (`rope_parameters`, `dtype`, `layer_types`) are understood.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import JsonKeys, read_json
from qwen_jax.quantization_config import QuantizationConfig

__all__ = ["ModelConfig", "QuantizationConfig", "YarnConfig"]

logger = logging.getLogger("qwen_jax")

DTYPES = ("float32", "bfloat16", "float16")

# Training, bookkeeping, other software's switches, and the generation defaults that old files kept here
# (generation_config.json decides them).
MEANINGLESS = frozenset(
    """
    _name_or_path architectures auto_map transformers_version transformers.js_config tokenizer_class
    model_max_length use_cache initializer_range attention_dropout attn_dropout_prob emb_dropout_prob
    hidden_dropout dropout classifier_dropout embd_pdrop attn_pdrop resid_pdrop bias_dropout_fusion torchscript
    use_bfloat16 _attn_implementation attn_implementation _attn_implementation_autoset output_attentions
    output_hidden_states return_dict chunk_size_feed_forward is_decoder cross_attention_hidden_size
    tie_encoder_decoder tf_legacy_loss finetuning_task id2label label2id num_labels problem_type
    task_specific_params prefix decoder_start_token_id sep_token_id unsloth_version unsloth_fixed pretraining_tp
    is_llama_config onnx_safe bf16 fp16 fp32 params_dtype softmax_in_fp32 use_flash_attn use_cache_kernel
    use_cache_quantization max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens quantization_config compression_config
    """.split()
)


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN's stretch of the rotary frequencies (arXiv:2309.00071), every default filled in as transformers does.

    Attributes:
        factor: how many times longer the stretched context is.
        original_max_position_embeddings: the context length before stretching.
        beta_fast: turns in the original context above which a frequency is kept.
        beta_slow: turns below which it is divided by `factor`.
        attention_factor: multiplies cos and sin; 0.1·ln(factor) + 1 unless the file says otherwise.
        truncate: whether the bounds between kept and divided frequencies are rounded outwards to whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything about a model's architecture that inference depends on.

    Attributes:
        family: "qwen" (the first generation), "qwen2" (also 1.5, 2.5 and Llama-shaped models) or "qwen3".
        vocab_size: rows of the embedding, which may exceed the tokenizer's ids.
        hidden_size: D.
        intermediate_size: F, the MLP's inner size (half of the number in a first-generation file).
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads; divides H.
        head_dim: K, even.
        norm_epsilon: of every RMS norm.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: longest context the file claims.
        seq_length: trained length, where dynamic NTK and log-n scaling begin; else max_position_embeddings.
        yarn: None without YaRN.
        use_dynamic_ntk: first generation: stretch the rotary base beyond seq_length.
        use_logn_attention: first generation: scale queries beyond seq_length.
        tie_word_embeddings: whether the head is the embedding.
        attention_bias: whether query, key and value have biases.
        qk_norm: whether query and key heads are normalised.
        sliding_window: tokens a sliding layer sees, itself included; None if no layer slides.
        sliding_layers: L booleans.
        dtype: of the file's weights: "float32", "bfloat16" or "float16".
        eos_token_ids: ids that end a sequence; generation_config.json may name others.
        bos_token_id: None where the family has none.
        pad_token_id: None where the file names none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope_theta: float
    max_position_embeddings: int
    seq_length: int
    yarn: YarnConfig | None = None
    use_dynamic_ntk: bool = False
    use_logn_attention: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Reads `folder`/config.json.

        Raises:
            CheckpointError: names file and key: a missing, mistyped, contradictory or unknown one, an unknown
                model_type or rope type.
        """
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """The same from a parsed file; `where` begins every error message."""
        keys = JsonKeys(raw, where)
        model_type = keys.take(str, "model_type")
        if model_type in NOT_YET:
            raise CheckpointError(
                f"{where}: model_type {model_type!r} is a mixture of experts, which is not supported yet; "
                f"supported: {', '.join(FAMILIES)}."
            )
        if model_type not in FAMILIES:
            raise CheckpointError(f"{where}: model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}.")
        keys.ignore(MEANINGLESS)
        keys.must_be("is_encoder_decoder", False, "only decoders are supported")
        keys.must_be("add_cross_attention", False, "only decoders are supported")
        keys.must_be("pruned_heads", {}, "every head must be there")
        config = cls(**FAMILIES[model_type](keys), **_shared(keys))
        keys.refuse_unread("it may change the model's results, so it is not ignored. If it has no meaning, remove it.")
        _check(config, where)
        return config


def _shared(keys: JsonKeys) -> dict[str, Any]:
    """Fields that all families spell alike."""
    dtype = keys.take(str, "dtype", "torch_dtype", default=None)
    if dtype is None:  # the first generation's flags
        flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        dtype = next((name for flag, name in flags.items() if keys.raw.get(flag) is True), "float32")
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{keys.where}: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    return {
        "dtype": dtype,
        "tie_word_embeddings": keys.take(bool, "tie_word_embeddings", default=False),
        "eos_token_ids": keys.token_ids("eos_token_id"),
        "bos_token_id": keys.one_token_id("bos_token_id"),
        "pad_token_id": keys.one_token_id("pad_token_id"),
    }


def _qwen(keys: JsonKeys) -> dict[str, Any]:
    """The first generation: configuration_qwen.py, and the first release's GPT-2-like spellings."""
    keys.must_be("rotary_pct", 1.0, "rotary embeddings that cover part of a head are not supported")
    keys.must_be("scale_attn_weights", True, "unscaled attention is not supported")
    keys.must_be("no_bias", True, "only the fused query/key/value projection has a bias")
    keys.must_be("activation", "swiglu", "no other MLP is supported")
    keys.must_be("pos_emb", "rotary", "no other position embedding is supported")
    keys.must_be("apply_residual_connection_post_layernorm", False, "the residual is taken before the norm")
    hidden_size = keys.positive("hidden_size", "n_embd")
    num_heads = keys.positive("num_attention_heads", "n_head")
    num_layers = keys.positive("num_hidden_layers", "n_layer")
    head_dim = keys.positive("kv_channels", default=hidden_size // num_heads)
    double_inner = keys.positive("intermediate_size", "ffn_hidden_size")
    if double_inner % 2:
        raise CheckpointError(
            f"{keys.where}: intermediate_size is {double_inner}; a qwen file gives twice the MLP's inner size, so it "
            "must be even."
        )
    if head_dim * num_heads != hidden_size:
        raise CheckpointError(
            f"{keys.where}: kv_channels × num_attention_heads is {head_dim} × {num_heads} = {head_dim * num_heads}, "
            f"expected hidden_size {hidden_size}."
        )
    seq_length = keys.positive("seq_length", default=None)
    longest = keys.positive("max_position_embeddings", "n_positions", default=seq_length or 8192)
    return {
        "family": "qwen",
        "vocab_size": keys.positive("padded_vocab_size", "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": double_inner // 2,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "norm_epsilon": keys.positive_float("layer_norm_epsilon", default=1e-6),
        "rope_theta": _theta(keys, keys.positive_float("rotary_emb_base", default=None), "rotary_emb_base", 10000.0),
        "max_position_embeddings": longest,
        "seq_length": seq_length or longest,
        "use_dynamic_ntk": keys.take(bool, "use_dynamic_ntk", default=False),
        "use_logn_attention": keys.take(bool, "use_logn_attn", default=False),
        "attention_bias": True,
        "sliding_layers": (False,) * num_layers,
    }


def _qwen2(keys: JsonKeys) -> dict[str, Any]:
    # transformers' Qwen2 has biases always; files of a Llama model in Qwen2's names may say that theirs has none.
    bias = keys.take(bool, "attention_bias", "qkv_bias", default=True)
    return {"family": "qwen2", "attention_bias": bias} | _newer(keys)


def _llama(keys: JsonKeys) -> dict[str, Any]:
    """Llama is Qwen2 without biases."""
    keys.must_be("attention_bias", False, "a Llama model with biases also has one on the output projection")
    keys.must_be("rope_interleaved", False, "pairs of a head are its two halves")
    return {"family": "qwen2", "attention_bias": False} | _newer(keys, default_theta=10000.0)


def _qwen3(keys: JsonKeys) -> dict[str, Any]:
    bias = keys.take(bool, "attention_bias", default=False)
    return {"family": "qwen3", "attention_bias": bias, "qk_norm": True} | _newer(keys, default_head_dim=128)


def _newer(keys: JsonKeys, default_theta=10000.0, default_head_dim=None) -> dict[str, Any]:
    """What Qwen2, Qwen3 and Llama have in common; defaults are those of transformers' configuration classes."""
    keys.must_be("hidden_act", "silu", "no other activation is supported")
    keys.must_be("mlp_bias", False, "biases in the MLP are not supported")
    keys.must_be("use_mrope", False, "multimodal rotary embeddings are not supported")
    hidden_size = keys.positive("hidden_size")
    num_heads = keys.positive("num_attention_heads")
    num_layers = keys.positive("num_hidden_layers")
    if default_head_dim is None:
        default_head_dim = hidden_size // num_heads
        if "head_dim" not in keys.raw and hidden_size % num_heads:
            raise CheckpointError(
                f"{keys.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; "
                "such a model needs head_dim."
            )
    longest = keys.positive("max_position_embeddings", default=32768)
    theta, yarn = _rope(keys, longest, default_theta)
    window, sliding_layers = _sliding(keys, num_layers)
    return {
        "vocab_size": keys.positive("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": keys.positive("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": keys.positive("num_key_value_heads", default=num_heads),
        "head_dim": keys.positive("head_dim", default=default_head_dim),
        "norm_epsilon": keys.positive_float("rms_norm_eps", default=1e-6),
        "rope_theta": theta,
        "yarn": yarn,
        "max_position_embeddings": longest,
        "seq_length": longest,
        "sliding_window": window,
        "sliding_layers": sliding_layers,
    }


def _theta(keys: JsonKeys, theta: float | None, name: str, default: float) -> float:
    if theta is not None:
        return theta
    logger.warning("%s: no %s; using this family's documented default, %g.", keys.where, name, default)
    return default


def _rope(keys: JsonKeys, longest: int, default_theta: float) -> tuple[float, YarnConfig | None]:
    """Theta and YaRN, from rope_theta + rope_scaling (old) or rope_parameters (transformers 5)."""
    scaling = keys.take(dict, "rope_parameters", "rope_scaling", default={})
    place = "rope_parameters" if keys.raw.get("rope_parameters") else "rope_scaling"
    rope = JsonKeys(scaling, f"{keys.where}: {place}")
    inside = rope.positive_float("rope_theta", default=None)
    outside = keys.positive_float("rope_theta", default=inside)
    if inside is not None and inside != outside:
        raise CheckpointError(
            f"{keys.where}: rope_theta is {outside:g} but {inside:g} inside rope_parameters; remove the wrong one."
        )
    theta = _theta(keys, outside, "rope_theta", default_theta)
    for each in (keys, rope):
        each.must_be("partial_rotary_factor", 1.0, "rotary embeddings that cover part of a head are not supported")
    rope_type = rope.take(str, "rope_type", "type", default="default")
    if rope_type == "default":
        rope.ignore(["factor"] if scaling.get("factor") in (None, 1, 1.0) else [])
        rope.refuse_unread("rope type 'default' has only rope_theta.")
        return theta, None
    if rope_type != "yarn":
        raise CheckpointError(f"{rope.where}: rope type is {rope_type!r}, expected 'default' or 'yarn'.")
    yarn = _yarn(rope, longest, keys.positive("original_max_position_embeddings", default=None))
    rope.refuse_unread("it is none of YaRN's parameters.")
    return theta, yarn


def _yarn(rope: JsonKeys, longest: int, outer_original: int | None) -> YarnConfig:
    original = outer_original or rope.positive("original_max_position_embeddings", default=longest)
    rope.ignore(["original_max_position_embeddings"])
    factor = rope.positive_float("factor", default=longest / original)
    if factor < 1:
        raise CheckpointError(f"{rope.where}: factor is {factor:g}, expected at least 1.")

    def growth(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    mscale = rope.take(float, "mscale", default=0.0)
    mscale_all_dim = rope.take(float, "mscale_all_dim", default=0.0)
    derived = growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth()
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.take(float, "beta_fast", default=0.0) or 32.0,
        beta_slow=rope.take(float, "beta_slow", default=0.0) or 1.0,
        attention_factor=rope.positive_float("attention_factor", default=derived),
        truncate=rope.take(bool, "truncate", default=True),
    )


def _sliding(keys: JsonKeys, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers that use it: layers ≥ max_window_layers, or those that layer_types names."""
    used = keys.take(bool, "use_sliding_window", default=False)
    window = keys.positive("sliding_window", default=None) if used else None
    first = keys.take(int, "max_window_layers", default=28)
    kinds = keys.take(list, "layer_types", default=None)
    keys.ignore(["sliding_window"])
    if kinds is None:
        sliding = tuple(window is not None and layer >= first for layer in range(num_layers))
    else:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            raise CheckpointError(
                f"{keys.where}: layer_types holds {len(kinds)} entries of {sorted(map(str, set(kinds)))}, expected "
                f"{num_layers} (num_hidden_layers) of 'full_attention' and 'sliding_attention'."
            )
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
        if any(sliding) and window is None:
            raise CheckpointError(
                f"{keys.where}: layer_types has sliding layers but use_sliding_window is {used} and sliding_window "
                f"{keys.raw.get('sliding_window')!r}; make them agree."
            )
    return (window if any(sliding) else None), sliding


def _check(config: ModelConfig, where: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads "
            f"{config.num_kv_heads}."
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim is {config.head_dim}, expected an even number (rotary pairs).")


FAMILIES: dict[str, Callable[[JsonKeys], dict[str, Any]]] = {
    "qwen": _qwen,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "llama": _llama,
}
NOT_YET = ("qwen2_moe", "qwen3_moe")
