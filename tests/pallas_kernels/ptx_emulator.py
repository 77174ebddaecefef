"""NumPy stand-ins for the MLIR modules that the Hopper matmul's inline code is written with: it runs on a CPU, as is.

A value is an array over the 128 threads of one warpgroup, in lockstep; shared memory is bytes, a ref the address of its
first one. `install` puts the stand-ins in a module's place of `arith`, `ir`, `llvm` and `utils`.
"""

import re
import types

import ml_dtypes
import numpy as np

THREADS = 128
HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
LANE, WARP = np.arange(THREADS) % 32, np.arange(THREADS) // 32
shared = np.zeros(1 << 18, np.uint8)


def install(monkeypatch, *modules):
    """Replaces the MLIR modules of each module for one test; shared memory starts as NaN in any float type."""
    shared[:] = 0xFF
    for module in modules:
        for name, stand_in in (("arith", arith), ("ir", ir), ("llvm", llvm), ("utils", utils)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


def put(array, address: int) -> int:
    """Writes an array into shared memory; returns the address, which is a ref."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    shared[address : address + raw.size] = raw
    return address


def _words(value):
    return np.broadcast_to(np.asarray(value, np.int32), (THREADS,))


def _integer(operation):
    def apply(left, right):
        left, right = _words(left).view(np.uint32), _words(right).view(np.uint32)
        with np.errstate(over="ignore"):
            return operation(left, right).astype(np.uint32).view(np.int32)

    return apply


def _float(operation):
    return lambda *values: operation(*values).astype(np.float32)


def _bitcast(kind, value):
    return np.ascontiguousarray(value).view({"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind])


arith = types.SimpleNamespace(
    addi=_integer(np.add),
    subi=_integer(np.subtract),
    muli=_integer(np.multiply),
    andi=_integer(np.bitwise_and),
    ori=_integer(np.bitwise_or),
    xori=_integer(np.bitwise_xor),
    shli=_integer(np.left_shift),
    shrui=_integer(np.right_shift),
    divui=_integer(np.floor_divide),
    minui=_integer(np.minimum),
    addf=_float(np.add),
    mulf=_float(np.multiply),
    uitofp=lambda kind, value: _words(value).view(np.uint32).astype(np.float32),
    sitofp=lambda kind, value: _words(value).astype(np.float32),
    extf=lambda kind, value: value.astype(np.float32),
    trunci=lambda kind, value: _words(value).view(np.uint32).astype(np.uint16),
    bitcast=_bitcast,
)
ir = types.SimpleNamespace(
    IntegerType=types.SimpleNamespace(get_signless=lambda bits: f"i{bits}"),
    **{name: types.SimpleNamespace(get=lambda kind=kind: kind) for name, kind in
       (("F32Type", "f32"), ("F16Type", "f16"), ("BF16Type", "bf16"))},
)  # fmt: skip
llvm = types.SimpleNamespace(ptrtoint=lambda kind, value: _words(value))


def _load(address, offset, size):
    at = _words(address)[:, None] + offset + np.arange(size)
    return np.ascontiguousarray(shared[at])


def _halves(value, kind):
    """[128, 2] of a word's two 16-bit numbers."""
    return np.ascontiguousarray(_words(value)).view(HALVES[kind]).reshape(THREADS, 2)


def _pack(pairs, kind):
    return np.ascontiguousarray(pairs.astype(HALVES[kind])).view(np.int32).reshape(THREADS)


def _multiply_add(kind, values):
    """mma.m16n8k16 in float64, each warp by itself (PTX ISA, "Matrix Fragments for mma.m16n8k16")."""
    a, b, c = values[:4], values[4:6], values[6:]
    result = [np.zeros(THREADS, np.float32) for _ in range(4)]
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for warp in range(THREADS // 32):
        lanes = slice(32 * warp, 32 * warp + 32)
        left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for odd in (0, 1):
            for register in range(4):
                column = 2 * t + 8 * (register // 2) + odd
                left[g + 8 * (register % 2), column] = _halves(a[register], kind)[lanes, odd]
            for register in range(2):
                right[2 * t + 8 * register + odd, g] = _halves(b[register], kind)[lanes, odd]
            for high in (0, 1):
                total[g + 8 * high, 2 * t + odd] = np.broadcast_to(c[2 * high + odd], (THREADS,))[lanes]
        total = total + left @ right
        for high in (0, 1):
            for odd in (0, 1):
                result[2 * high + odd][lanes] = total[g + 8 * high, 2 * t + odd]
    return tuple(result)


def inline_ptx(ptx, *values, result_types=None, predicate=None, has_side_effects=False, convergent=False):
    """The instructions that the kernels use; an unknown one raises."""
    del result_types, predicate, has_side_effects, convergent
    name, text = ptx.split()[0], ptx
    offset = int(found.group(1)) if (found := re.search(r"\[\$\d+\+(\d+)\]", text)) else 0
    if name == "lop3.b32":
        table = int(text.rstrip(";").split(",")[-1])
        result = np.zeros(THREADS, np.uint32)
        x, y, z = (_words(value).view(np.uint32) for value in values)
        for bit in range(8):  # bit 4·x + 2·y + z of the table
            if table >> bit & 1:
                result |= (x if bit & 4 else ~x) & (y if bit & 2 else ~y) & (z if bit & 1 else ~z)
        return result.view(np.int32)
    if found := re.fullmatch(r"(sub|mul)\.rn\.(bf16|f16)x2", name):
        operation = np.subtract if found.group(1) == "sub" else np.multiply
        left, right = (_halves(value, found.group(2)).astype(np.float64) for value in values)
        return _pack(operation(left, right), found.group(2))
    if found := re.fullmatch(r"cvt\.rn\.(bf16|f16)x2\.f32", name):
        return _pack(np.stack([values[0], values[1]], 1), found.group(1))  # "$0, $2, $1": the first operand is high
    if name == "fma.rn.f32":
        return (np.float64(values[0]) * values[1] + values[2]).astype(np.float32)
    if name == "ld.shared.v4.b32":
        return tuple(_load(values[0], offset, 16).view(np.int32).T)
    if name == "ld.shared.f32":
        return _load(values[0], offset, 4).view(np.float32).reshape(THREADS)
    if name in ("ld.shared.u16", "ld.shared.u8"):
        size = 2 if name.endswith("16") else 1
        return _load(values[0], offset, size).view(f"u{size}").reshape(THREADS).astype(np.int32)
    if name == "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
        address = _words(values[0]) + offset
        results = []
        for matrix in range(4):
            source = address[32 * WARP + 8 * matrix + LANE // 4] + 4 * (LANE % 4)
            results.append(_load(source, 0, 4).view(np.int32).reshape(THREADS))
        return tuple(results)
    if found := re.match(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)", name):
        return _multiply_add(found.group(1), values)
    raise NotImplementedError(ptx)


def _constant(value, kind):
    return np.full(THREADS, value, np.float32) if kind == "f32" else np.full(THREADS, value, np.int32)


utils = types.SimpleNamespace(
    c=_constant,
    thread_idx=lambda: np.arange(THREADS, dtype=np.int32),
    memref_ptr=lambda ref: ref,
    inline_ptx=inline_ptx,
)
