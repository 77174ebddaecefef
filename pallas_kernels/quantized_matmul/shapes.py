"""`MatmulShape`, what a kernel is chosen by, and the shapes that tests, benchmarks and the tuner share."""

import dataclasses

ROWS = (1, 2, 4, 8, 16, 64, 128, 256, 512, 1024, 2048)

# [in, out] of each projection by model; query/key/value and gate/up fused along out, as they are loaded.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "SmolLM2-135M": {"qkv": (576, 960), "output": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)},
    "Qwen2.5-0.5B": {"qkv": (896, 1152), "output": (896, 896), "gate_up": (896, 9728), "down": (4864, 896)},
    "Qwen2.5-1.5B": {"qkv": (1536, 2048), "output": (1536, 1536), "gate_up": (1536, 17920), "down": (8960, 1536)},
    "Qwen-1.8B": {"qkv": (2048, 6144), "output": (2048, 2048), "gate_up": (2048, 11008), "down": (5504, 2048)},
    "Qwen2.5-3B": {"qkv": (2048, 2560), "output": (2048, 2048), "gate_up": (2048, 22016), "down": (11008, 2048)},
    "Qwen3-4B": {"qkv": (2560, 6144), "output": (4096, 2560), "gate_up": (2560, 19456), "down": (9728, 2560)},
    "Qwen-7B": {"qkv": (4096, 12288), "output": (4096, 4096), "gate_up": (4096, 22016), "down": (11008, 4096)},
    "Qwen2.5-7B": {"qkv": (3584, 4608), "output": (3584, 3584), "gate_up": (3584, 37888), "down": (18944, 3584)},
    "Qwen3-8B": {"qkv": (4096, 6144), "output": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096)},
    "Qwen-14B": {"qkv": (5120, 15360), "output": (5120, 5120), "gate_up": (5120, 27392), "down": (13696, 5120)},
    "Qwen2.5-14B": {"qkv": (5120, 7168), "output": (5120, 5120), "gate_up": (5120, 27648), "down": (13824, 5120)},
    "Qwen2.5-32B": {"qkv": (5120, 7168), "output": (5120, 5120), "gate_up": (5120, 55296), "down": (27648, 5120)},
    "Qwen-72B": {"qkv": (8192, 24576), "output": (8192, 8192), "gate_up": (8192, 49152), "down": (24576, 8192)},
    "Qwen2.5-72B": {"qkv": (8192, 10240), "output": (8192, 8192), "gate_up": (8192, 59136), "down": (29568, 8192)},
}


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """All that the choice of a kernel depends on, so that it can be asked for any chip without an array.

    Attributes:
        rows: M, the product of all leading dimensions of x.
        in_features: I.
        out_features: O.
        bits: 2, 3, 4 or 8.
        group_size: rows of the weight that share a scale.
        zeros: whether zero-points are stored (asymmetric weights).
        permutation: whether rows are stored in another order (act-order). x reaches a kernel already gathered.
        dtype: name of x's element type, which is the result's too.
        layout: of `QuantizedTensor.packed`.
        layers: length of the stack, 0 for a single matrix.
    """

    rows: int
    in_features: int
    out_features: int
    bits: int = 4
    group_size: int = 128
    zeros: bool = False
    permutation: bool = False
    dtype: str = "bfloat16"
    layout: str = "gptq"
    layers: int = 0

    def __str__(self) -> str:
        extras = "".join(
            f", {text}"
            for text, present in (
                ("zero-points", self.zeros),
                ("act-order", self.permutation),
                (f"layout {self.layout}", self.layout != "gptq"),
            )
            if present
        )
        return (
            f"[{self.rows}, {self.in_features}] x [{self.in_features}, {self.out_features}] {self.dtype}, "
            f"{self.bits} bits, group_size {self.group_size}{extras}"
        )


# Small enough for the interpreters, one for each thing that a kernel can get wrong.
SMALL_SHAPES = (
    MatmulShape(1, 128, 64),
    MatmulShape(3, 128, 64, group_size=64, zeros=True),
    MatmulShape(8, 256, 96, group_size=32, permutation=True),
    MatmulShape(2, 320, 96, group_size=128),
    MatmulShape(5, 320, 40, group_size=320, zeros=True, permutation=True),
    MatmulShape(4, 192, 33, bits=8, group_size=64),
    MatmulShape(33, 192, 64, bits=8, group_size=192, zeros=True),
    MatmulShape(2, 256, 64, layers=3),
    MatmulShape(17, 256, 64, group_size=64, zeros=True, permutation=True, layers=2),
)
