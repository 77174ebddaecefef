"""Multiplying by a GPTQ-quantized weight: one public function, several kernels."""

from pallas_kernels.quantized_matmul.op import KERNELS, Choice, choose, prepack, quantized_matmul, shape_of, unpack
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

__all__ = [
    "KERNELS",
    "Choice",
    "MatmulShape",
    "QuantizedTensor",
    "choose",
    "prepack",
    "quantized_matmul",
    "shape_of",
    "unpack",
]
