"""Tensor names of each family and ours, as tables, and what a model of a given configuration must hold.

A line of a table maps a file's module or vector to our path; {n} is a layer, * whatever the file stores there (weight,
bias, qweight, scales, …). The tables are one-to-one, so that they also write files.
"""

from qwen_jax.config import ModelConfig

QWEN = {
    "transformer.wte.*": "embedding.*",
    "transformer.h.{n}.ln_1.weight": "layers.{n}.attention_norm.scale",
    "transformer.h.{n}.attn.c_attn.*": "layers.{n}.attention.qkv.*",
    "transformer.h.{n}.attn.c_proj.*": "layers.{n}.attention.output.*",
    "transformer.h.{n}.ln_2.weight": "layers.{n}.mlp_norm.scale",
    "transformer.h.{n}.mlp.w2.*": "layers.{n}.mlp.gate.*",  # the first generation's w2 is the gate, w1 the other
    "transformer.h.{n}.mlp.w1.*": "layers.{n}.mlp.up.*",
    "transformer.h.{n}.mlp.c_proj.*": "layers.{n}.mlp.down.*",
    "transformer.ln_f.weight": "final_norm.scale",
    "lm_head.*": "lm_head.*",
}
QWEN2 = {
    "model.embed_tokens.*": "embedding.*",
    "model.layers.{n}.input_layernorm.weight": "layers.{n}.attention_norm.scale",
    "model.layers.{n}.self_attn.q_proj.*": "layers.{n}.attention.query.*",
    "model.layers.{n}.self_attn.k_proj.*": "layers.{n}.attention.key.*",
    "model.layers.{n}.self_attn.v_proj.*": "layers.{n}.attention.value.*",
    "model.layers.{n}.self_attn.o_proj.*": "layers.{n}.attention.output.*",
    "model.layers.{n}.post_attention_layernorm.weight": "layers.{n}.mlp_norm.scale",
    "model.layers.{n}.mlp.gate_proj.*": "layers.{n}.mlp.gate.*",
    "model.layers.{n}.mlp.up_proj.*": "layers.{n}.mlp.up.*",
    "model.layers.{n}.mlp.down_proj.*": "layers.{n}.mlp.down.*",
    "model.norm.weight": "final_norm.scale",
    "lm_head.*": "lm_head.*",
}
QWEN3 = QWEN2 | {
    "model.layers.{n}.self_attn.q_norm.weight": "layers.{n}.attention.query_norm.scale",
    "model.layers.{n}.self_attn.k_norm.weight": "layers.{n}.attention.key_norm.scale",
}
# Mixtures of experts will add {e}: "model.layers.{n}.mlp.experts.{e}.gate_proj.*", "model.layers.{n}.mlp.gate.*" (the
# router) and Qwen2's "mlp.shared_expert.*"; until then config.py refuses those families.
TABLES = {"qwen": QWEN, "qwen2": QWEN2, "qwen3": QWEN3}

# Buffers that old files keep: rotary tables follow from the configuration, masks from the positions.
BUFFERS = frozenset(
    {
        "transformer.rotary_emb.inv_freq",
        "transformer.h.{n}.attn.rotary_emb.inv_freq",
        "transformer.h.{n}.attn.masked_bias",
        "transformer.h.{n}.attn.bias",
        "model.rotary_emb.inv_freq",
        "model.layers.{n}.self_attn.rotary_emb.inv_freq",
    }
)


def split(name: str) -> tuple[str, int | None]:
    """A name with its layer number taken out: "layers.3.mlp.up" → ("layers.{n}.mlp.up", 3)."""
    parts = name.split(".")
    layer = None
    for place, part in enumerate(parts):
        if part.isdecimal():
            parts[place], layer = "{n}", int(part)
            break
    return ".".join(parts), layer


def ours(family: str, name: str) -> tuple[str, str] | None:
    """A file's tensor name → (our path, what is stored there: "weight", "qweight", "bias" …); None if it has no place.

    >>> ours("qwen", "transformer.h.3.mlp.w2.qweight")
    ('layers.3.mlp.gate', 'qweight')
    >>> ours("qwen2", "model.norm.weight")
    ('final_norm.scale', 'weight')
    """
    pattern, layer = split(name)
    table = TABLES[family]
    module, _, stored = pattern.rpartition(".")
    if pattern in table:
        path = table[pattern]
    elif f"{module}.*" in table:
        path = table[f"{module}.*"].removesuffix(".*")
    else:
        return None
    return path.replace("{n}", str(layer)), stored


def theirs(family: str, path: str) -> str:
    """Our path → the file's module, without what is stored there: "layers.3.mlp.gate" → "transformer.h.3.mlp.w2".

    Raises:
        ValueError: if the family has no such path.
    """
    pattern, layer = split(path)
    for name, place in TABLES[family].items():
        if place.removesuffix(".*") == pattern:
            return name.rpartition(".")[0].replace("{n}", str(layer))
    raise ValueError(f"{path!r} is no parameter of family {family!r}.")


def is_buffer(name: str) -> bool:
    """Whether a file's tensor is one of those that inference does not need."""
    return split(name)[0] in BUFFERS


def modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix of a model: our path → (in_features, out_features); the head only if it is not the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.family == "qwen":
        attention = {"qkv": (hidden, query + 2 * key)}
    else:
        attention = {"query": (hidden, query), "key": (hidden, key), "value": (hidden, key)}
    attention["output"] = (query, hidden)
    shapes = {"embedding": (hidden, config.vocab_size)}
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.attention.{part}": shape for part, shape in attention.items()}
        shapes |= {f"layers.{layer}.mlp.{part}": (hidden, inner) for part in ("gate", "up")}
        shapes[f"layers.{layer}.mlp.down"] = (inner, hidden)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (hidden, config.vocab_size)
    return shapes


def vectors(config: ModelConfig) -> dict[str, int]:
    """Every norm's scale: our path → length."""
    lengths = {"final_norm.scale": config.hidden_size}
    for layer in range(config.num_layers):
        lengths |= {f"layers.{layer}.{norm}.scale": config.hidden_size for norm in ("attention_norm", "mlp_norm")}
        if config.qk_norm:
            lengths |= {
                f"layers.{layer}.attention.{norm}.scale": config.head_dim for norm in ("query_norm", "key_norm")
            }
    return lengths


def may_have_bias(config: ModelConfig, path: str) -> bool:
    """Whether the family gives this matrix a bias; elsewhere a file's bias must be zero (AutoGPTQ adds such)."""
    part = path.rpartition(".")[2]
    if config.family == "qwen3" and part == "output":  # transformers' Qwen3 gives all four projections one, or none
        return config.attention_bias
    return part in ("qkv", "query", "key", "value") and config.attention_bias
