"""Attention dimensions of the models, × batch × context: read by benchmarks and tuning."""

from typing import NamedTuple


class AttentionDims(NamedTuple):
    """Heads of one model's attention.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels a head.
        key_bias: whether keys have a bias, which attention over an 8-bit cache adds back.
        layers: decoder layers.
    """

    heads: int
    kv_heads: int
    head_dim: int
    key_bias: bool
    layers: int


MODELS = {
    "qwen-1.8b": AttentionDims(16, 16, 128, True, 24),
    "qwen-7b": AttentionDims(32, 32, 128, True, 32),
    "qwen-14b": AttentionDims(40, 40, 128, True, 40),
    "qwen-72b": AttentionDims(64, 64, 128, True, 80),
    "qwen2.5-0.5b": AttentionDims(14, 2, 64, True, 24),
    "qwen2.5-1.5b": AttentionDims(12, 2, 128, True, 28),
    "qwen2.5-7b": AttentionDims(28, 4, 128, True, 28),
    "qwen2.5-14b": AttentionDims(40, 8, 128, True, 48),
    "qwen2.5-72b": AttentionDims(64, 8, 128, True, 80),
    "qwen3-0.6b": AttentionDims(16, 8, 128, False, 28),
    "qwen3-8b": AttentionDims(32, 8, 128, False, 36),
    "qwen3-32b": AttentionDims(64, 8, 128, False, 64),
}
BATCHES = (1, 8, 32, 64)
CONTEXTS = (512, 2048, 8192, 32768)


def bytes_read(dims: AttentionDims, tokens: int, quantized: bool, itemsize: int = 2) -> int:
    """Bytes of keys, values and scales that attention of one layer reads for `tokens` cached tokens."""
    per_head = 2 * dims.head_dim + 8 if quantized else 2 * dims.head_dim * itemsize
    return tokens * dims.kv_heads * per_head
