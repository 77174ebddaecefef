"""Warp-level instructions for Mosaic GPU kernels: thin wrappers that emit MLIR, for use inside `plgpu.inline_mgpu`.

Values are MLIR values of one thread: i32 words (often two packed halves), i32 integers, f32 floats, pointers.
"""

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf

SHARED, GLOBAL = 3, 1


def i32_type():
    """The 32-bit integer type."""
    return ir.IntegerType.get_signless(32)


def f32_type():
    """The float32 type."""
    return ir.F32Type.get()


def i32(value: int):
    """An integer constant; unsigned 32-bit values are taken by their bits."""
    value &= 0xFFFFFFFF
    return arith.constant(i32_type(), ir.IntegerAttr.get(i32_type(), value - (value >> 31 << 32)))


def f32(value: float):
    """A float constant."""
    return arith.constant(f32_type(), ir.FloatAttr.get(f32_type(), value))


def _integer(value):
    return i32(value) if isinstance(value, int) else value


def iadd(*terms):
    """Sum of integers; Python ints allowed."""
    known = sum(term for term in terms if isinstance(term, int))
    values = [term for term in terms if not isinstance(term, int)]
    if known or not values:
        values.append(i32(known))
    total = values[0]
    for value in values[1:]:
        total = arith.addi(total, value)
    return total


def imul(a, b):
    """Product of integers."""
    return arith.muli(_integer(a), _integer(b))


def idiv(a, b):
    """Quotient of non-negative integers."""
    return arith.divui(_integer(a), _integer(b))


def irem(a, b):
    """Remainder of non-negative integers."""
    return arith.remui(_integer(a), _integer(b))


def ixor(a, b):
    """Bitwise exclusive or."""
    return arith.xori(_integer(a), _integer(b))


def imin(a, b):
    """Minimum of signed integers."""
    return arith.minsi(_integer(a), _integer(b))


def imax(a, b):
    """Maximum of signed integers."""
    return arith.maxsi(_integer(a), _integer(b))


def less(a, b):
    """Signed a < b, as i1."""
    return arith.cmpi(arith.CmpIPredicate.slt, _integer(a), _integer(b))


def equal(a, b):
    """Integer a == b, as i1."""
    return arith.cmpi(arith.CmpIPredicate.eq, _integer(a), _integer(b))


def both(a, b):
    """Logical and of two i1."""
    return arith.andi(a, b)


def either(a, b):
    """Logical or of two i1."""
    return arith.ori(a, b)


def float_less(a, b):
    """Float a < b, as i1."""
    return arith.cmpf(arith.CmpFPredicate.OLT, a, b)


def float_equal(a, b):
    """Float a == b, as i1."""
    return arith.cmpf(arith.CmpFPredicate.OEQ, a, b)


def as_word(x):
    """The bits of a float as an i32."""
    return arith.bitcast(i32_type(), x)


def as_float(word):
    """The float of an i32's bits."""
    return arith.bitcast(f32_type(), word)


def select(condition, a, b):
    """A where the condition holds, else b."""
    return arith.select(condition, a, b)


def add(a, b):
    """Float sum."""
    return arith.addf(a, b)


def sub(a, b):
    """Float difference."""
    return arith.subf(a, b)


def mul(a, b):
    """Float product."""
    return arith.mulf(a, b)


def maximum(a, b):
    """The larger float; of a NaN and a number the number."""
    return arith.maxnumf(a, b)


def minimum(a, b):
    """The smaller float."""
    return arith.minnumf(a, b)


def divide(a, b):
    """Float quotient, correctly rounded."""
    return asm("div.rn.f32 $0, $1, $2;", [f32_type()], a, b)


def sqrt(x):
    """Square root, correctly rounded."""
    return asm("sqrt.rn.f32 $0, $1;", [f32_type()], x)


def round_to_float16(x):
    """A float rounded to float16 and back."""
    return arith.extf(f32_type(), arith.truncf(ir.F16Type.get(), x))


def to_byte(x):
    """A float rounded to the nearest integer, ties to even, clipped to 0 … 255, as an i32."""
    nearest = asm("cvt.rni.s32.f32 $0, $1;", [i32_type()], x)
    return arith.minsi(arith.maxsi(nearest, i32(0)), i32(255))


def fma(a, b, c):
    """Fused a·b + c."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [f32_type()], a, b, c)


def asm(text: str, results, *operands, effects: bool = False):
    """Inline PTX; `effects` for whatever touches memory or other threads."""
    letters = {"i32": "r", "f32": "f", "i64": "l", "i1": "b"}

    def letter(kind):
        return "l" if isinstance(kind, llvm.PointerType) else letters[str(kind)]

    constraints = ",".join([f"={letter(kind)}" for kind in results] + [letter(value.type) for value in operands])
    if not results:
        kind = ir.Type.parse("!llvm.void")
    else:
        kind = results[0] if len(results) == 1 else llvm.StructType.get_literal(list(results))
    result = llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=effects or not results)
    if len(results) <= 1:
        return result
    return tuple(llvm.extractvalue(kind, result, [index]) for index, kind in enumerate(results))


def exp2(x):
    """2^x, 2 ulp."""
    return asm("ex2.approx.ftz.f32 $0, $1;", [f32_type()], x)


def log2(x):
    """log2(x), about 2^-22 absolute near 1."""
    return asm("lg2.approx.ftz.f32 $0, $1;", [f32_type()], x)


def reciprocal(x):
    """1/x, 1 ulp."""
    return asm("rcp.approx.ftz.f32 $0, $1;", [f32_type()], x)


def permute(a, b, selector: int):
    """Four bytes of the eight in (a: 0–3, b: 4–7), picked by the selector's nibbles, low first."""
    return asm(f"prmt.b32 $0, $1, $2, {selector};", [i32_type()], a, b)


def pack(low, high, half: str):
    """Two floats rounded to a word of two halves ("f16" or "bf16")."""
    return asm(f"cvt.rn.{half}x2.f32 $0, $1, $2;", [i32_type()], high, low)


def unpack(word, half: str):
    """A word of two halves as two floats, low first."""
    if half == "bf16":
        low, high = arith.shli(word, i32(16)), arith.andi(word, i32(0xFFFF0000))
        return arith.bitcast(f32_type(), low), arith.bitcast(f32_type(), high)
    text = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    return asm(text, [f32_type(), f32_type()], word)


def subtract_f16x2(a, b):
    """Difference of two words of float16 pairs."""
    return asm("sub.rn.f16x2 $0, $1, $2;", [i32_type()], a, b)


def mma(acc, a, b, half: str):
    """acc + a·b of one warp: 16 rows, 8 columns, depth 16; acc four floats, a four words, b two words."""
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 "
    text += "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return asm(text, [f32_type()] * 4, *a, *b, *acc)


def transpose(word):
    """The 8×8 matrix of halves a warp holds, a row's two neighbours a word, transposed."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [i32_type()], word, effects=True)


def shuffle_xor(x, distance: int):
    """The value of the lane `distance` apart (xor)."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
    return as_float(asm(text, [i32_type()], as_word(x), effects=True))


def shuffle_up(x, distance: int):
    """The i32 of the lane `distance` below; a lane without one gets zero."""
    text = "{.reg .pred p; shfl.sync.up.b32 $0|p, $1, " + str(distance) + ", 0x0, 0xffffffff; @!p mov.b32 $0, 0;}"
    return asm(text, [i32_type()], x, effects=True)


def broadcast(x, lane: int):
    """The i32 of one lane, in all."""
    return asm(f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1f, 0xffffffff;", [i32_type()], x, effects=True)


def warp_sum(x):
    """The sum of an i32 over the warp."""
    return asm("redux.sync.add.s32 $0, $1, 0xffffffff;", [i32_type()], x, effects=True)


def float_warp_sum(x):
    """The sum of a float over the warp, in all lanes."""
    for distance in (16, 8, 4, 2, 1):
        x = add(x, shuffle_xor(x, distance))
    return x


def warp_max(x):
    """The maximum of an i32 over the warp."""
    return asm("redux.sync.max.s32 $0, $1, 0xffffffff;", [i32_type()], x, effects=True)


def any_lane(condition):
    """Whether an i1 holds in any lane, the same in all."""
    text = "{.reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q;}"
    word = asm(text, [i32_type()], select(condition, i32(1), i32(0)), effects=True)
    return equal(word, 1)


def warp_barrier():
    """All lanes of the warp meet; their memory accesses are ordered."""
    # LLVM knows this to be convergent; inline PTX it may copy into both sides of a branch, where lanes meet apart.
    nvvm.bar_warp_sync(i32(0xFFFFFFFF))


def warpgroup_barrier():
    """All threads of the warpgroup meet; their memory accesses are ordered."""
    utils.warpgroup_barrier()


def increment_or_wrap(pointer, limit):
    """Atomically adds one to an unsigned i32 in global memory, or zeroes it at `limit`; returns what it was."""
    return asm("atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;", [i32_type()], pointer, limit, effects=True)


def fence_device():
    """Orders this thread's memory accesses for the whole device."""
    asm("fence.acq_rel.gpu;", [])


def thread_index():
    """Index of the thread within its warpgroup."""
    return irem(arith.index_cast(i32_type(), gpu.thread_id(gpu.Dimension.x)), 128)


def offset(pointer, byte_offset):
    """Pointer plus bytes (i32 value or int)."""
    byte = ir.IntegerType.get_signless(8)
    if isinstance(byte_offset, int):
        return llvm.getelementptr(pointer.type, pointer, [], [byte_offset], byte, llvm.GEPNoWrapFlags.none)
    dynamic = -(2**31)
    return llvm.getelementptr(pointer.type, pointer, [byte_offset], [dynamic], byte, llvm.GEPNoWrapFlags.none)


def load_words(pointer, byte_offset, count: int):
    """`count` (1, 2 or 4) consecutive i32 words, aligned to their size, in one access."""
    where = offset(pointer, byte_offset)
    if count == 1:
        return [llvm.load(i32_type(), where, alignment=4)]
    vector = llvm.load(ir.VectorType.get((count,), i32_type()), where, alignment=4 * count)
    return [llvm.extractelement(vector, i32(index)) for index in range(count)]


def store_words(pointer, byte_offset, words):
    """Stores 1, 2 or 4 words, aligned to their size, in one access."""
    value = words[0]
    if len(words) > 1:
        value = llvm.mlir_undef(ir.VectorType.get((len(words),), i32_type()))
        for index, word in enumerate(words):
            value = llvm.insertelement(value, word, position=i32(index))
    llvm.store(value, offset(pointer, byte_offset), alignment=4 * len(words))


def load_floats(pointer, byte_offset, count: int = 1):
    """As `load_words`, floats."""
    return [arith.bitcast(f32_type(), word) for word in load_words(pointer, byte_offset, count)]


def store_floats(pointer, byte_offset, values):
    """As `store_words`, floats."""
    store_words(pointer, byte_offset, [arith.bitcast(i32_type(), value) for value in values])


def load_float_of(pointer, byte_offset, dtype: str):
    """One element of "float16", "bfloat16" or "float32" as a float."""
    if dtype == "float32":
        return load_floats(pointer, byte_offset)[0]
    kind = ir.F16Type.get() if dtype == "float16" else ir.BF16Type.get()
    return arith.extf(f32_type(), llvm.load(kind, offset(pointer, byte_offset), alignment=2))


def store_float_as(pointer, byte_offset, value, dtype: str):
    """Rounds a float to the dtype and stores it."""
    if dtype == "float32":
        store_floats(pointer, byte_offset, [value])
        return
    kind = ir.F16Type.get() if dtype == "float16" else ir.BF16Type.get()
    llvm.store(arith.truncf(kind, value), offset(pointer, byte_offset), alignment=2)


def store_byte(pointer, byte_offset, value):
    """Stores the low byte of an i32."""
    byte = ir.IntegerType.get_signless(8)
    llvm.store(arith.trunci(byte, value), offset(pointer, byte_offset), alignment=1)


def element(pointer, index, size: int):
    """Address of the index-th element of `size` bytes, in 64 bits."""
    wide, byte = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(8)
    at = arith.muli(arith.extui(wide, index), arith.constant(wide, ir.IntegerAttr.get(wide, size)))
    return llvm.getelementptr(pointer.type, pointer, [at], [-(2**31)], byte, llvm.GEPNoWrapFlags.none)


def when(condition, body):
    """Emits body() under a condition (i1), or always if it is None."""
    if condition is None:
        body()
        return
    op = scf.IfOp(condition)
    with ir.InsertionPoint(op.then_block):
        body()
        scf.YieldOp([])


def branch(condition, then, otherwise, count: int):
    """The `count` floats that then() or otherwise() gives."""
    op = scf.IfOp(condition, [f32_type()] * count, has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.YieldOp(then())
    with ir.InsertionPoint(op.else_block):
        scf.YieldOp(otherwise())
    return list(op.results)


def loop(count, step: int, begin, body):
    """Floats carried through body(index, carried) for index in range(0, count, step)."""
    op = scf.ForOp(i32(0), count, i32(step), list(begin))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(body(op.induction_variable, list(op.inner_iter_args)))
    return list(op.results)


def load_device(pointer, byte_offset, count: int):
    """2 or 4 floats another block wrote, from the L2 cache (never a stale line of L1), in one access."""
    results = ",".join(f"${index}" for index in range(count))
    text = f"ld.relaxed.gpu.global.v{count}.f32 {{{results}}}, [${count}];"
    return list(asm(text, [f32_type()] * count, offset(pointer, byte_offset), effects=True))
