"""A checkpoint of random numbers: any dimensions, read a module at a time by the loaders that read a real one."""

import dataclasses
import math
import zlib
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np

from converters.gptq import divided
from converters.huggingface import Module, ModuleSpec
from converters.safetensors_files import Runs, at_runs, length
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.bench.random_numbers import scale
from qwen_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class RandomCheckpoint:
    """The reading side of `converters.huggingface.Checkpoint`; a path always gives the same numbers.

    Attributes:
        config: the architecture.
        bits: 16 for float weights, else those of the layers' projections (embedding and head stay 16-bit).
        group_size: inputs a scale.
        dtype: of float weights and of scales.
        seed: of everything.
    """

    config: ModelConfig
    bits: int = 4
    group_size: int = 128
    dtype: str = "bfloat16"
    seed: int = 0

    def spec(self, path: str) -> ModuleSpec:
        """See `Checkpoint.spec`."""
        inputs, outputs = self._shape(path)
        has_bias = self.config.attention_bias and path.endswith(("query", "key", "value", "qkv"))
        dense = self.bits == 16 or not path.startswith("layers.")
        quantization: dict[str, Any] = {} if dense else {"bits": self.bits, "group_size": min(self.group_size, inputs)}
        return ModuleSpec("dense" if dense else "quantized", inputs, outputs, self.dtype, has_bias, **quantization)

    def read(self, path: str, rows: Runs | None = None, columns: Runs | None = None) -> Module:
        """See `Checkpoint.read`."""
        module = self._whole(path)
        if rows is None and columns is None:
            return module
        if isinstance(weight := module.weight, DenseTensor):
            data_OI = at_runs(at_runs(np.asarray(weight.data), columns, 0), rows, 1)
            return Module(dataclasses.replace(weight, data=data_OI, in_features=data_OI.shape[1]), module.bias)
        packed = at_runs(at_runs(np.asarray(weight.packed), divided(rows, 32, weight.bits), 0), columns, 1)
        scales = at_runs(at_runs(np.asarray(weight.scales), divided(rows, weight.group_size), 0), columns, 1)
        inputs = weight.in_features if rows is None else length(rows)
        return Module(dataclasses.replace(weight, packed=packed, scales=scales, in_features=inputs), module.bias)

    def _whole(self, path: str) -> Module:
        spec, rng = self.spec(path), self._rng(path)
        I, O = spec.in_features, spec.out_features  # noqa: E741
        bias = rng.standard_normal(O, np.float32) if spec.has_bias else None
        if spec.bits is None or spec.group_size is None:
            data_OI = np.empty((O, I), self.dtype)
            for start in range(0, O, 4096):  # a table in float32 would be gigabytes
                rows = data_OI[start : start + 4096]
                rows[:] = rng.standard_normal(rows.shape, np.float32) / np.float32(math.sqrt(I))
            return Module(DenseTensor(data_OI, self.dtype, I, "transposed"), bias)
        words, groups = -(-I * spec.bits // 32), -(-I // spec.group_size)
        packed = rng.integers(-(2**31), 2**31, (words, O), np.int32)
        scales = scale(I, spec.bits) * rng.uniform(0.8, 1.2, (groups, O))
        weight = QuantizedTensor(packed, scales.astype(self.dtype), None, None, spec.bits, spec.group_size, I)
        return Module(weight, bias)

    def read_vector(self, path: str) -> np.ndarray:
        """See `Checkpoint.read_vector`."""
        heads = path.endswith(("query_norm.scale", "key_norm.scale"))
        return np.ones(self.config.head_dim if heads else self.config.hidden_size, np.float32)

    def _shape(self, path: str) -> tuple[int, int]:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = {
            "query": (hidden, heads),
            "key": (hidden, kv_heads),
            "value": (hidden, kv_heads),
            "qkv": (hidden, heads + 2 * kv_heads),
            "output": (heads, hidden),
            "gate": (hidden, inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
            "embedding": (hidden, config.vocab_size),
            "lm_head": (hidden, config.vocab_size),
        }
        return shapes[path.rpartition(".")[2]]

    def _rng(self, path: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(path.encode())]))
