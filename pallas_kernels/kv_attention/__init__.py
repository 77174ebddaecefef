"""Attention over a key/value cache of 16 or 8 bits."""

from pallas_kernels.kv_attention.op import (
    append,
    attend_decode,
    attend_prefill,
    choose,
    rotate_append,
    rotate_append_unsupported,
)
from pallas_kernels.kv_attention.segments import attend_segments
from pallas_kernels.kv_attention.tensor import KVArrays, scale_dtype

__all__ = [
    "KVArrays",
    "append",
    "attend_decode",
    "attend_prefill",
    "attend_segments",
    "choose",
    "rotate_append",
    "rotate_append_unsupported",
    "scale_dtype",
]
