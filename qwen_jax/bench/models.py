"""Dimensions of the models that benchmarks and plans know by name (from the checkpoints' own config.json)."""

from qwen_jax.config import ModelConfig


def _qwen(layers, hidden, inner, heads, vocab, context=8192) -> ModelConfig:
    return ModelConfig(
        family="qwen",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        norm_epsilon=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=32768,
        seq_length=context,
        use_dynamic_ntk=True,
        use_logn_attention=True,
        sliding_layers=(False,) * layers,
        dtype="bfloat16",
    )


def _newer(family, layers, hidden, inner, heads, kv_heads, vocab, head_dim=128, tied=False) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768,
        seq_length=32768,
        tie_word_embeddings=tied,
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_layers=(False,) * layers,
        dtype="bfloat16",
    )


MODELS: dict[str, ModelConfig] = {
    "qwen-1.8b": _qwen(24, 2048, 5504, 16, 151936),
    "qwen-7b": _qwen(32, 4096, 11008, 32, 151936),
    "qwen-14b": _qwen(40, 5120, 13696, 40, 152064, context=2048),
    "qwen-72b": _qwen(80, 8192, 24576, 64, 152064, context=32768),
    "qwen2.5-0.5b": _newer("qwen2", 24, 896, 4864, 14, 2, 151936, 64, tied=True),
    "qwen2.5-1.5b": _newer("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "qwen2.5-7b": _newer("qwen2", 28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-14b": _newer("qwen2", 48, 5120, 13824, 40, 8, 152064),
    "qwen2.5-72b": _newer("qwen2", 80, 8192, 29568, 64, 8, 152064),
    "qwen3-4b": _newer("qwen3", 36, 2560, 9728, 32, 8, 151936, tied=True),
    "qwen3-8b": _newer("qwen3", 36, 4096, 12288, 32, 8, 151936),
}
