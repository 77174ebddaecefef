"""The persistent decode kernel's code: all warps of a small grid on the emulator, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step import (
    attention,
    cache,
    consumer,
    kernel,
    layer,
    loader,
    matmul,
    newest,
    op,
    reference,
)
from pallas_kernels.kv_attention import mosaic_gpu_append, mosaic_gpu_fragments
from pallas_kernels.kv_attention.reference import rotary_tables
from pallas_kernels.kv_attention.tensor import KVArrays
from pallas_kernels.quantized_matmul import QuantizedTensor, layout, layout_mosaic_gpu
from tests.pallas_kernels import block_emulator as emulator

K = 128
H100 = "NVIDIA H100 80GB HBM3"


MODULES = (attention, cache, consumer, kernel, layer, loader, matmul, newest, mosaic_gpu_append, mosaic_gpu_fragments)


@pytest.fixture
def on_the_emulator(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "w", emulator)
        if hasattr(module, "d"):
            monkeypatch.setattr(module, "d", emulator)
    return emulator


def bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16)


@dataclasses.dataclass
class Case:
    """A small model: sizes, formats, and random arrays."""

    batch: int = 1
    hidden: int = 256
    heads: int = 2
    kv_heads: int = 2
    inner: int = 384
    layers: int = 2
    length: int = 64
    lengths: tuple[int, ...] = (39,)
    bits: int = 4
    group_size: int = 128
    zeros: bool = False
    quantized: bool = True
    bias: bool = True
    qk_norm: bool = False
    logn: bool = False
    window: int | None = None
    table_rows: int = 1

    def __post_init__(self):
        self.rng = rng = np.random.default_rng(self.heads + 7 * self.bits + self.batch)
        D, L, H, G = self.hidden, self.layers, self.heads, self.kv_heads
        joint = (H + 2 * G) * K
        sizes = {"qkv": (D, joint), "output": (H * K, D), "gate_up": (D, 2 * self.inner), "down": (self.inner, D)}
        self.tensors, self.dense = {}, {}
        for name, (rows, columns) in sizes.items():
            self.tensors[name], self.dense[name] = self.weight(rows, columns)
        self.vectors = {
            "attention_norm": bf16(rng.normal(1, 0.1, (L, D))),
            "mlp_norm": bf16(rng.normal(1, 0.1, (L, D))),
            "qkv_bias": None,
            "key_bias": None,
            "query_norm": bf16(rng.normal(1, 0.1, (L, K))) if self.qk_norm else None,
            "key_norm": bf16(rng.normal(1, 0.1, (L, K))) if self.qk_norm else None,
        }
        if self.bias:
            bias = rng.normal(0, 0.3, (L, joint))
            bias[:, H * K : (H + G) * K] = 0
            self.vectors["qkv_bias"] = bf16(bias)
            key_bias = rng.normal(0, 1, (L, G * K))
            key_bias[:, K // 2 - 1 :: K] += 30
            self.vectors["key_bias"] = bf16(key_bias)
        S, B = self.length, self.batch
        shape = (L + 1, B, G, S, K)
        if self.quantized:
            scales = [rng.uniform(lo, hi, shape[:-1]).astype(np.float16) for lo, hi in ((0.005, 0.02), (-2, -0.5)) * 2]
            self.kv = KVArrays(*(rng.integers(0, 256, shape).astype(np.uint8) for _ in range(2)), *scales)
        else:
            self.kv = KVArrays(*(bf16(rng.normal(0.2, 1, shape)) for _ in range(2)))
        self.x = bf16(rng.normal(0.1, 1, (B, D)))
        frequencies = 1e4 ** (-np.arange(K // 2) / (K // 2))
        tables = [frequencies * (1 + 0.2 * i) for i in range(self.table_rows)]
        self.key_rotary = [t.astype(np.float32) for t in rotary_tables(np.arange(S), np.stack(tables))]
        at = np.asarray(self.lengths) - 1
        rows = np.arange(B) % self.table_rows
        self.rotary = [table[rows, at] for table in self.key_rotary]
        self.logn_S = rng.uniform(1, 1.3, S).astype(np.float32) if self.logn else None

    def weight(self, rows, columns):
        """(QuantizedTensor [L, rows, columns] in layout "mosaic_gpu", its float64 matrices)."""
        rng, L, groups = self.rng, self.layers, -(-rows // self.group_size)
        q = rng.integers(0, 2**self.bits, (L, rows, columns)).astype(np.int64)
        scales = bf16(rng.uniform(0.5, 1.5, (L, groups, columns)) * 0.7 / (2**self.bits * np.sqrt(rows) / 3.5))
        zeros = rng.integers(0, 2**self.bits, (L, groups, columns)).astype(np.uint8) if self.zeros else None
        packed = np.stack([layout.pack(matrix, self.bits) for matrix in q])
        tensor = QuantizedTensor(packed, scales, zeros, None, self.bits, self.group_size, rows)
        group = np.arange(rows) // self.group_size
        middle = 2 ** (self.bits - 1) if zeros is None else zeros[:, group].astype(np.float64)
        return layout_mosaic_gpu.prepack(tensor), (q - middle) * scales[:, group].astype(np.float64)

    def weights(self):
        return op.LayerWeights(**self.tensors, **self.vectors)

    def reference(self):
        layers = []
        for number in range(self.layers):
            matrices = {name: dense[number] for name, dense in self.dense.items()}
            vectors = {n: None if v is None else v[number].astype(np.float64) for n, v in self.vectors.items()}
            layers.append(matrices | vectors)
        return reference.decode_step(
            self.x, layers, self.kv, self.lengths, self.rotary, epsilon=1e-6, scale=K**-0.5, first_layer=1,
            key_rotary=self.key_rotary, logn_B=self.logn_S[np.asarray(self.lengths) - 1] if self.logn else None,
            window=self.window,
        )  # fmt: skip

    def start(self):
        return jnp.asarray(self.lengths, jnp.int32) - 1

    def tables(self):
        return op.Tables.of(*map(jnp.asarray, self.key_rotary), self.logn_S)

    def plan(self, blocks, **options):
        shape = op.shape_of(self.x, self.weights(), self.kv)
        facts = dict(
            cache_layers=self.layers + 1,
            first_layer=1,
            bias_dtype="bfloat16" if self.bias else None,
            key_bias_dtype="bfloat16" if self.bias else None,
            qk_norm=self.qk_norm,
            logn=self.logn,
            window=self.window,
            table_rows=self.table_rows,
        )
        return op.plan_for(shape, blocks, **(facts | options))


def emulate(case, plan, seed=0):
    """(hidden, cache) of the kernel's code, every warp of every block."""
    inputs = op.operands(case.x, case.weights(), case.start(), case.tables())
    memories = {name: emulator.Memory(np.asarray(array)) for name, array in inputs.items()}
    for name, shape in kernel.result_shapes(plan).items():
        memories[name] = emulator.Memory(np.full(shape.shape, np.nan, shape.dtype))
    cached = {name: getattr(case.kv, name) for name in kernel.CACHE if getattr(case.kv, name) is not None}
    memories |= {name: emulator.Memory(array) for name, array in cached.items()}
    pointers = {name: emulator.Pointer(memory) for name, memory in memories.items()}
    _, size = plan.regions()

    def body(block, shared):
        kernel.emit(plan, pointers, shared, emulator.i32(block))

    emulator.Grid(plan.blocks, plan.warps + 4, size, body, seed).run()
    assert not memories["counters"].bytes.any(), "the grid's counters must be back at zero"
    kv = KVArrays(**{name: memories[name].as_array(array.dtype, array.shape) for name, array in cached.items()})
    return memories["hidden"].as_array(ml_dtypes.bfloat16, (case.batch, case.hidden)).astype(np.float64), kv


def check(case, plan, seed=0, limit=1.5e-2):
    hidden, kv = emulate(case, plan, seed)
    want, wanted_kv = case.reference()
    error = np.linalg.norm(hidden - want) / np.linalg.norm(want)
    assert error < limit, error
    for name in kernel.CACHE:
        got, wish, before = (getattr(x, name) for x in (kv, wanted_kv, case.kv))
        if got is None:
            continue
        untouched = np.ones(got.shape, bool)
        for row, length in enumerate(case.lengths):
            untouched[1:, row, :, length - 1] = False
        assert np.array_equal(got[untouched], np.asarray(before)[untouched])
        new, wish = got[~untouched].astype(np.float64), np.asarray(wish)[~untouched].astype(np.float64)
        spread = 255 if got.dtype == np.uint8 else np.abs(wish).max()
        assert np.abs(new - wish).max() < 0.08 * spread, name
    return error


@pytest.mark.parametrize(
    "case, blocks, options",
    [
        (dict(), 3, dict(splits=2)),
        (dict(batch=3, lengths=(1, 64, 30), heads=4, kv_heads=1, logn=True, table_rows=3), 4, dict(splits=1)),
        (dict(batch=2, lengths=(17, 33), quantized=False, qk_norm=True), 2, dict(splits=3)),
        (dict(group_size=32, zeros=True, heads=8, kv_heads=1, lengths=(50,), window=20), 7, dict(splits=2, slots=8)),
        (dict(bits=8, group_size=64, bias=False, lengths=(64,)), 5, dict(splits=4)),
        # The direct form. Several tiles of down a warp, the last with half of its chunks.
        (dict(batch=5, lengths=(1, 39, 64, 17, 2), inner=2432, layers=1), 10, dict(splits=1, direct=True)),
        # Six parts of the cache a block, and a table of turns for each row.
        (
            dict(batch=8, lengths=range(20, 28), zeros=True, group_size=64, window=20, table_rows=8),
            3,
            dict(splits=1, direct=True, seed=1),
        ),
        (dict(batch=2, lengths=(3, 9), bits=8, zeros=True, inner=1408), 11, dict(splits=1, direct=True, seed=2)),
        (
            dict(batch=3, heads=8, kv_heads=2, lengths=(1, 64, 30), quantized=False, qk_norm=True, logn=True),
            4,
            dict(splits=3, direct=True, seed=3),
        ),
    ],
)
def test_equals_float64(on_the_emulator, case, blocks, options):
    case, seed = Case(**case), options.pop("seed", 0)
    check(case, case.plan(blocks, warps=8, **options), seed)


def test_a_late_copy_is_waited_for(on_the_emulator):
    """The first copy lands last of all: nobody may take a slot's next lap for the one that is still on its way."""
    case = Case(hidden=1024, inner=256, layers=1)
    hidden, _ = emulate(case, case.plan(4, warps=8, splits=1, slots=16), seed=1)
    want, _ = case.reference()
    assert np.linalg.norm(hidden - want) < 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "quantized, bias, direct", [(True, True, False), (True, False, False), (False, True, False), (True, True, True)]
)
def test_lowers_for_cuda_in_place(quantized, bias, direct):
    case = Case(quantized=quantized, bias=bias)

    def step(x, weights, kv, start, tables):
        options = dict(direct=direct)
        return op.run(x, weights, kv, start, tables, chip=H100, epsilon=1e-6, first_layer=1, plan_options=options)

    arguments = jax.tree.map(jnp.asarray, (case.x, case.weights(), case.kv, case.start(), case.tables()))
    traced = jax.jit(step, donate_argnums=2).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("tf.aliasing_output") == (6 if quantized else 2)


@pytest.mark.parametrize(
    "hidden, inner, staged, most",
    [
        (2048, 5504, 8, 8),  # Qwen-1.8B
        (4096, 11008, 6, 8),  # 7B
        (5120, 13696, 5, 5),  # 14B
        (8192, 24576, 3, 3),  # 72B
    ],
)
def test_rows_that_shared_memory_does_not_hold_are_read_directly(hidden, inner, staged, most):
    shape = op.shape_of((case := Case()).x, case.weights(), case.kv)
    heads = hidden // K
    shape = dataclasses.replace(shape, hidden=hidden, inner=inner, heads=heads, kv_heads=heads, layers=1, length=2048)
    for rows in range(1, 9):
        some = dataclasses.replace(shape, batch=rows)
        if rows > most:
            assert op.unsupported(some, H100) == f"{rows} rows of {inner} leave too little shared memory"
            continue
        plan = op.plan_for(some, 132)
        _, size = plan.regions()
        assert plan.direct == (rows > staged)
        assert plan.slots >= 2 * plan.warps and size <= 226 * 1024


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(head_dim=64), "128 channels"),
        (dict(batch=9), "1 to 8 rows"),
        (dict(length=40), "multiple of 16"),
        (dict(dtype="float16"), "bfloat16"),
        (dict(matrices=(("qkv", 4, 128, "bfloat16", True, True, "mosaic_gpu"),)), "act-order"),
        (dict(matrices=(("down", 3, 128, "bfloat16", True, False, "mosaic_gpu"),)), "4 or 8 bits"),
        (dict(batch=8, inner=24576, hidden=5120), "8 rows of 24576 leave too little shared memory"),
        (dict(batch=8, inner=6912, hidden=5120), "a kernel at a time is faster for more than 5 rows of 5120"),
    ],
)
def test_unsupported_says_why(change, reason):
    case = Case()
    shape = op.shape_of(case.x, case.weights(), case.kv)
    assert op.unsupported(shape, H100) is None
    assert reason in op.unsupported(dataclasses.replace(shape, **change), H100)
    assert "known size" in op.unsupported(shape, "NVIDIA A100-SXM4-80GB")
