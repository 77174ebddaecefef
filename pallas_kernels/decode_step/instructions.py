"""What a persistent kernel needs beside `kv_attention.warp`: copy rings, barriers of a block and of the grid, operands.

Emitted inside `plgpu.inline_mgpu`; pointers are LLVM pointers. `tests` hold a NumPy twin of each function.
"""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

from pallas_kernels.kv_attention import warp as w


def thread_in_block():
    """Index of the thread in its block."""
    return arith.index_cast(w.i32_type(), gpu.thread_id(gpu.Dimension.x))


def load_matrices(pointer, byte_offset: int):
    """ldmatrix of four 8 × 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l // 8."""
    text = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}}, [$4+{byte_offset}];"
    return list(w.asm(text, [w.i32_type()] * 4, pointer, effects=True))


def masked_or(word, mask: int, other: int):
    """(word & mask) | other in one instruction."""
    return w.asm("lop3.b32 $0, $1, $2, $3, 0xEA;", [w.i32_type()], word, w.i32(mask), w.i32(other))


def shift_right(word, count: int):
    """Logical shift of a word."""
    return arith.shrui(word, w.i32(count)) if count else word


def subtract_bf16x2(a, b):
    """Difference of two words of bfloat16 pairs."""
    return w.asm("sub.rn.bf16x2 $0, $1, $2;", [w.i32_type()], a, b)


def masked_xor(word, mask: int, other: int):
    """(word & mask) ^ other in one instruction."""
    return w.asm("lop3.b32 $0, $1, $2, $3, 0x6A;", [w.i32_type()], word, w.i32(mask), w.i32(other))


def float_of_byte(pointer, byte_offset):
    """One unsigned byte of memory as a float."""
    byte = llvm.load(ir.IntegerType.get_signless(8), w.offset(pointer, byte_offset), alignment=1)
    return arith.uitofp(w.f32_type(), byte)


def reciprocal_sqrt(x):
    """1 / sqrt(x), 2^-22 relative."""
    return w.asm("rsqrt.approx.ftz.f32 $0, $1;", [w.f32_type()], x)


def load_fresh(pointer, byte_offset, count: int):
    """1, 2 or 4 words that another block wrote, from the L2 cache (never a stale line of L1), in one access."""
    results = ",".join(f"${index}" for index in range(count))
    kind, results = ("b32", results) if count == 1 else (f"v{count}.b32", f"{{{results}}}")
    text = f"ld.relaxed.gpu.global.{kind} {results}, [${count}];"
    words = w.asm(text, [w.i32_type()] * count, w.offset(pointer, byte_offset), effects=True)
    return [words] if count == 1 else list(words)


def load_fresh_if(condition, pointer, byte_offset):
    """Four words as by `load_fresh`, or zeros where the condition does not hold."""
    text = "{mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
    text += "@$5 ld.relaxed.gpu.global.v4.b32 {$0,$1,$2,$3}, [$4]; }"
    return list(w.asm(text, [w.i32_type()] * 4, w.offset(pointer, byte_offset), condition, effects=True))


def pick(condition, a, b):
    """Pointer a where the condition holds, else b."""
    return arith.select(condition, a, b)


def load_volatile(pointer):
    """A word of shared memory that no compiler knows or moves."""
    return w.asm("ld.volatile.shared.b32 $0, [$1];", [w.i32_type()], pointer, effects=True)


# -- barriers of a block ------------------------------------------------------------------------------------------


def barrier_init(pointer, arrivals: int):
    """Makes an mbarrier that completes a phase after so many arrivals and all bytes expected."""
    w.asm("mbarrier.init.shared::cta.b64 [$0], $1;", [], pointer, w.i32(arrivals))


def barriers_ready():
    """Makes fresh mbarriers visible to the copy engine."""
    w.asm("fence.mbarrier_init.release.cluster;", [])
    w.asm("fence.proxy.async.shared::cta;", [])


def barrier_expect(pointer, bytes_):
    """Arrives and adds bytes to expect."""
    w.asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [], pointer, bytes_)


def barrier_arrive(pointer):
    """Arrives."""
    w.asm("mbarrier.arrive.shared::cta.b64 _, [$0];", [], pointer)


def barrier_wait(pointer, parity):
    """Waits until the phase of this parity is complete."""
    text = "{.reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra.uni DONE; "
    w.asm(text + "bra.uni WAIT; DONE: }", [], pointer, parity)


def bulk_copy(target, source, bytes_, barrier):
    """Copies contiguous global memory (whole 16 bytes) into shared memory; the barrier counts the bytes.

    Every byte is read once a step: the L2 cache is told to drop it first.
    """
    text = "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
    text += "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    text += "[$0], [$1], $2, [$3], policy; }"
    w.asm(text, [], target, source, bytes_, barrier)


def fence_copies():
    """Orders this thread's accesses to shared memory before the copy engine's that follow."""
    w.asm("fence.proxy.async.shared::cta;", [])


def meet(name: int, threads: int):
    """Named barrier of some whole warps of the block.

    Their lanes come together first, for the barrier counts a warp whose lanes arrive apart more than once; and no
    inline PTX (see `warp.warp_barrier`).
    """
    w.warp_barrier()
    nvvm.barrier(barrier_id=w.i32(name), number_of_threads=w.i32(threads))


# -- the grid -----------------------------------------------------------------------------------------------------


def count_up(pointer):
    """Adds one to a word of global memory for the whole device, after all that this thread knows of."""
    w.asm("red.release.gpu.global.add.u32 [$0], 1;", [], pointer)


def await_count(pointer, target):
    """Waits until a word of global memory has reached a count."""
    text = "{.reg .pred p; .reg .u32 v; WAIT: ld.acquire.gpu.global.u32 v, [$0]; setp.lt.u32 p, v, $1; "
    w.asm(text + "@p bra WAIT; }", [], pointer, target)


def store_word(pointer, value):
    """Stores a word of global memory for the whole device."""
    w.asm("st.release.gpu.global.u32 [$0], $1;", [], pointer, value)


def fence_all():
    """Orders this thread's memory accesses for the whole device."""
    w.fence_device()


# -- other cards --------------------------------------------------------------------------------------------------


def push(pointer, value, number):
    """Writes a float and an integer as one 64-bit word, perhaps of another card's memory, seen whole or not at all."""
    text = "{.reg .b64 both; mov.b64 both, {$1, $2}; st.relaxed.sys.global.b64 [$0], both; }"
    w.asm(text, [], pointer, value, number)


def await_pushed(pointer, number):
    """The float that comes with a number: waits for it in a word of this card that any card may write."""
    text = "{.reg .pred p; .reg .b32 n; .reg .b64 both; WAIT: ld.relaxed.sys.global.b64 both, [$1]; "
    text += "mov.b64 {$0, n}, both; setp.ne.b32 p, n, $2; @p bra WAIT; }"
    return w.asm(text, [w.f32_type()], pointer, number, effects=True)


def load_pointer(pointer, byte_offset: int):
    """A 64-bit address of global memory."""
    return llvm.load(llvm.PointerType.get(), w.offset(pointer, byte_offset), alignment=8)


def push_four(pointer, apart: int, words, number):
    """As `push`, four words, each with the number: two at `pointer`, two `apart` bytes on; each 64 bits are whole."""
    text = "{.reg .b64 a, b, c, d; mov.b64 a, {$1, $5}; mov.b64 b, {$2, $5}; mov.b64 c, {$3, $5}; mov.b64 d, {$4, $5}; "
    text += f"st.relaxed.sys.global.v2.b64 [$0], {{a, b}}; st.relaxed.sys.global.v2.b64 [$0+{apart}], {{c, d}}; }}"
    w.asm(text, [], pointer, *words, number)


def await_four(skip, pointer, apart: int, number):
    """The four words that `push_four` wrote with a number, once they are there; zeros at once where `skip` holds."""
    text = "{.reg .pred p; .reg .b32 x<4>, n<4>; .reg .b64 both<4>; "
    text += "".join(f"mov.b32 x{i}, 0; " for i in range(4)) + "@$6 bra DONE; WAIT: "
    text += "ld.relaxed.sys.global.v2.b64 {both0, both1}, [$4]; "
    text += f"ld.relaxed.sys.global.v2.b64 {{both2, both3}}, [$4+{apart}]; "
    text += "".join(f"mov.b64 {{x{i}, n{i}}}, both{i}; " for i in range(4)) + "setp.ne.b32 p, n0, $5; "
    text += "".join(f"setp.ne.or.b32 p, n{i}, $5, p; " for i in range(1, 4)) + "@p bra WAIT; DONE: "
    text += "".join(f"mov.b32 ${i}, x{i}; " for i in range(4)) + "}"  # last: a result may share an operand's register
    return list(w.asm(text, [w.i32_type()] * 4, pointer, number, skip, effects=True))
