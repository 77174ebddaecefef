"""Multiplying by a dense weight, and looking rows up in one."""

from pallas_kernels.dense_matmul.head import quantize_head
from pallas_kernels.dense_matmul.op import choose, dense_matmul, embedding_lookup, prepack, unpack
from pallas_kernels.dense_matmul.tensor import DenseTensor

__all__ = ["DenseTensor", "choose", "dense_matmul", "embedding_lookup", "prepack", "quantize_head", "unpack"]
