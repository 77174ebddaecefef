"""Registers of tensor-core operands: packed words to operand A, shared memory to operand B, products, sums.

Everything here is emitted for one thread of a warpgroup, inside `plgpu.inline_mgpu`.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

# A field f put into the mantissa of this number gives number + f, exactly: 128 in bfloat16 (7 bits), 1024 in float16.
_MAGIC = {"bfloat16": 0x4300, "float16": 0x6400}
_SUFFIX = {"bfloat16": "bf16", "float16": "f16"}


def i32(value: int) -> ir.Value:
    """A constant."""
    return utils.c(int(np.uint32(value & 0xFFFFFFFF).view(np.int32)), ir.IntegerType.get_signless(32))


def f32_type() -> ir.Type:
    """float32."""
    return ir.F32Type.get()


def lane_and_warp() -> tuple[ir.Value, ir.Value]:
    """This thread's lane in its warp, and its warp in its warpgroup."""
    thread = utils.thread_idx()
    return arith.andi(thread, i32(31)), arith.andi(arith.shrui(thread, i32(5)), i32(3))


def multiply_add(value: ir.Value, factor: int, *terms: ir.Value) -> ir.Value:
    """value · factor + terms, int32."""
    total = arith.muli(value, i32(factor))
    for term in terms:
        total = arith.addi(total, term)
    return total


def address(ref: ir.Value, *offsets: ir.Value) -> ir.Value:
    """Shared-memory address of a ref plus byte offsets, as int32 for PTX."""
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))
    for offset in offsets:
        base = arith.addi(base, offset)
    return base


def load_shared(pointer: ir.Value, offset: int, kind: str):
    """ld.shared at pointer + offset; kind "v4.b32", "v2.f32", "f32", "u16" or "u8" (the last two as int32)."""
    word, f32 = ir.IntegerType.get_signless(32), f32_type()
    if kind in ("v4.b32", "v2.f32"):
        count, result = (4, word) if kind == "v4.b32" else (2, f32)
        outputs = ", ".join(f"${i}" for i in range(count))
        ptx = f"ld.shared.{kind} {{{outputs}}}, [${count}+{offset}];"
        return utils.inline_ptx(ptx, pointer, result_types=[result] * count, has_side_effects=True)
    if kind == "f32":
        return utils.inline_ptx(f"ld.shared.f32 $0, [$1+{offset}];", pointer, result_types=f32, has_side_effects=True)
    return utils.inline_ptx(f"ld.shared.{kind} $0, [$1+{offset}];", pointer, result_types=word, has_side_effects=True)


def load_matrices(pointer: ir.Value, offset: int) -> tuple[ir.Value, ...]:
    """Four 8 × 8 matrices of 16-bit numbers, lane l giving the address of row l % 8 of matrix l // 8."""
    return utils.inline_ptx(
        f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];",
        pointer,
        result_types=[ir.IntegerType.get_signless(32)] * 4,
        has_side_effects=True,
        convergent=True,
    )


def widen(bits: ir.Value, dtype: str) -> ir.Value:
    """float32 from a 16-bit number held in an int32 (or an f32 as it is)."""
    f32 = f32_type()
    if dtype == "float32":
        return bits
    if dtype == "bfloat16":
        return arith.bitcast(f32, arith.shli(bits, i32(16)))
    half = arith.trunci(ir.IntegerType.get_signless(16), bits)
    return arith.extf(f32, arith.bitcast(ir.F16Type.get(), half))


def narrow(low: ir.Value, high: ir.Value, dtype: str) -> ir.Value:
    """Two float32 rounded to 16 bits, in one int32."""
    return utils.inline_ptx(
        f"cvt.rn.{_SUFFIX[dtype]}x2.f32 $0, $2, $1;", low, high, result_types=ir.IntegerType.get_signless(32)
    )


def _masked(word: ir.Value, mask: int, other: int, table: int) -> ir.Value:
    """One lop3: (word & mask) | other (table 0xEA) or (word & mask) ^ other (0x6A)."""
    return utils.inline_ptx(
        f"lop3.b32 $0, $1, $2, $3, {table};", word, i32(mask), i32(other), result_types=ir.IntegerType.get_signless(32)
    )


def _subtract(left: ir.Value, right: ir.Value, dtype: str) -> ir.Value:
    return utils.inline_ptx(
        f"sub.rn.{_SUFFIX[dtype]}x2 $0, $1, $2;", left, right, result_types=ir.IntegerType.get_signless(32)
    )


def encoded(words, bits: int, dtype: str) -> list[ir.Value]:
    """Operand A of one 16 × 16 step as four registers of two numbers, q · unit + offset as `encoding` says.

    Args:
        words: one word (4 bits) or two (8 bits).
        bits: 4 or 8.
        dtype: "bfloat16" or "float16".
    """
    registers = []
    for index in range(4):
        word = words[0] if bits == 4 else words[index // 2]
        shift = 4 * index if bits == 4 else 8 * (index % 2)
        word = arith.shrui(word, i32(shift)) if shift else word
        if dtype == "float16":  # the field as it lies is a subnormal number, which tensor cores take
            registers.append(arith.andi(word, i32(0x000F000F if bits == 4 else 0x00FF00FF)))
        elif bits == 4:
            registers.append(_masked(word, 0x000F000F, _MAGIC[dtype] * 0x10001, 0xEA))
        else:
            # 255 does not fit into 7 bits: q − 128 = (128 + low 7 bits) − (256, or 128 where the top bit is set).
            low = _masked(word, 0x007F007F, 0x43004300, 0xEA)
            registers.append(_subtract(low, _masked(word, 0x00800080, 0x43804380, 0x6A), dtype))
    return registers


def encoding(bits: int, dtype: str) -> tuple[float, float]:
    """(unit, offset) of `encoded`."""
    if dtype == "float16":
        return 2.0**-24, 0.0
    return 1.0, 128.0 if bits == 4 else -128.0


def subtrahends(zeros, bits: int, dtype: str) -> tuple[ir.Value, ir.Value]:
    """What `integers` subtracts for columns g and g + 8: zero-points (int32, None: 2^(bits − 1)) made 16-bit pairs."""
    middle = i32(2 ** (bits - 1))
    low, high = (middle, middle) if zeros is None else zeros
    results = []
    for zero in (low, high):
        if bits == 8 and dtype == "bfloat16":  # zero − 128, which is within bfloat16's integers
            number = arith.sitofp(f32_type(), arith.subi(zero, i32(128)))
            results.append(narrow(number, number, dtype))
        else:
            results.append(arith.muli(arith.addi(zero, i32(_MAGIC[dtype])), i32(0x10001)))
    return tuple(results)


def integers(words, bits: int, dtype: str, minus, symmetric: bool) -> list[ir.Value]:
    """As `encoded`, but q − zero exactly.

    Args:
        words: one word (4 bits) or two (8 bits).
        bits: 4 or 8.
        dtype: "bfloat16" or "float16".
        minus: of `subtrahends`, for columns g (registers 0, 2) and g + 8 (registers 1, 3).
        symmetric: whether the zero-point is 2^(bits − 1).
    """
    if bits == 8 and dtype == "bfloat16":
        numbers = encoded(words, bits, dtype)
        return numbers if symmetric else [_subtract(n, minus[i % 2], dtype) for i, n in enumerate(numbers)]
    registers = []
    for index in range(4):
        word = words[0] if bits == 4 else words[index // 2]
        shift = 4 * index if bits == 4 else 8 * (index % 2)
        word = arith.shrui(word, i32(shift)) if shift else word
        number = _masked(word, 0x000F000F if bits == 4 else 0x00FF00FF, _MAGIC[dtype] * 0x10001, 0xEA)
        registers.append(_subtract(number, minus[index % 2], dtype))
    return registers


def ones(dtype: str) -> list[ir.Value]:
    """Operand A of ones."""
    return [i32({"bfloat16": 0x3F803F80, "float16": 0x3C003C00}[dtype])] * 4


def product(a, b, c, dtype: str) -> list[ir.Value]:
    """mma.m16n8k16: four float32 sums c (None for zeros) plus a · b."""
    f32, suffix = f32_type(), _SUFFIX[dtype]
    c = [utils.c(0.0, f32)] * 4 if c is None else c
    return list(
        utils.inline_ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{suffix}.{suffix}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *a,
            *b,
            *c,
            result_types=[f32] * 4,
            convergent=True,
        )
    )


def f32(value: float) -> ir.Value:
    """A float32 constant."""
    return utils.c(float(value), f32_type())


def fma(left: ir.Value, right: ir.Value, term: ir.Value) -> ir.Value:
    """left · right + term in float32."""
    return utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", left, right, term, result_types=f32_type())


def split(array) -> list[list[ir.Value]]:
    """float32 scalars of an array [64, 8n] in wgmma's layout: n lists of (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)."""
    registers = [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([position]))
        for register in array.registers.flatten()
        for position in range(2)
    ]
    return [registers[start : start + 4] for start in range(0, len(registers), 4)]


def join(array, tiles: list[list[ir.Value]]):
    """The inverse of `split`: an array like `array` with new registers."""
    kind = ir.VectorType.get((2,), f32_type())
    undefined, registers = llvm.mlir_undef(kind), []
    for tile in tiles:
        for low, high in (tile[:2], tile[2:]):
            pair = llvm.insertelement(undefined, low, position=i32(0))
            registers.append(llvm.insertelement(pair, high, position=i32(1)))
    shaped = np.asarray(registers, dtype=object).reshape(array.registers.shape)
    return type(array)(_registers=shaped, _layout=array.layout, _is_signed=array.is_signed)


def padded(x_MI, columns: int):
    """x with zeros to whole chunks of columns and, past 8 rows, to whole tiles of 8 (what a tensor map wants)."""
    rows = -x_MI.shape[0] % 8 if x_MI.shape[0] > 8 else 0
    columns = -x_MI.shape[1] % columns
    return jnp.pad(x_MI, ((0, rows), (0, columns))) if rows or columns else x_MI


def name(dtype) -> str:
    """A dtype's name."""
    return jnp.dtype(dtype).name


def multiply(left: ir.Value, right: ir.Value, dtype: str) -> ir.Value:
    """Product of two pairs of 16-bit numbers."""
    return utils.inline_ptx(
        f"mul.rn.{_SUFFIX[dtype]}x2 $0, $1, $2;", left, right, result_types=ir.IntegerType.get_signless(32)
    )


def global_pointer(ref: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """Address of element `index` (int64) of a ref in global memory."""
    return llvm.getelementptr(
        llvm.PointerType.get(), utils.memref_ptr(ref), [index], [-(2**31)], kind, llvm.GEPNoWrapFlags.none
    )


def load_global(ref: ir.Value, index: ir.Value, dtype: str) -> ir.Value:
    """float32 of element `index` (int32)."""
    kind = {"bfloat16": ir.BF16Type, "float16": ir.F16Type, "float32": ir.F32Type}[dtype].get()
    value = llvm.load(kind, global_pointer(ref, arith.extui(ir.IntegerType.get_signless(64), index), kind))
    return value if dtype == "float32" else arith.extf(f32_type(), value)


def store_row(ref: ir.Value, row: ir.Value, column: ir.Value, words, columns: int) -> None:
    """Stores 16-bit numbers, two a word, side by side in one row of a [.., columns] ref; none past the last."""
    i16, i64 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(64)
    index = arith.addi(arith.muli(arith.extui(i64, row), utils.c(columns, i64)), arith.extui(i64, column))
    pointer, count = global_pointer(ref, index, i16), len(words)
    if columns % (2 * count) == 0:
        names = ", ".join(f"${i + 1}" for i in range(count))
        utils.inline_ptx(f"st.global.v{count}.b32 [$0], {{{names}}};", pointer, *words, has_side_effects=True)
        return
    for place in range(2 * count):
        word = words[place // 2]
        value = arith.trunci(i16, arith.shrui(word, i32(16)) if place % 2 else word)
        inside = arith.cmpi(arith.CmpIPredicate.ult, arith.addi(column, i32(place)), i32(columns))
        with utils.when(inside):
            llvm.store(value, global_pointer(ref, arith.addi(index, utils.c(place, i64)), i16))


def cluster_barrier() -> None:
    """All threads of a cluster's blocks that have not ended wait for each other."""
    ptx = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    utils.inline_ptx(ptx, has_side_effects=True, convergent=True)
