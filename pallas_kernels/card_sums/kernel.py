"""The launch: every thread pushes 8 columns of its card's share to the other cards, waits for theirs, and adds.

A word of an inbox is 64 bits, two bfloat16 and the number of the reduction, written and read whole: who finds the
number has the values, without fences. Block b reads copy b of the number and leaves copies b, b + blocks, … one higher,
so that no block waits for another of its card; the cards count alike, for all run the same kernels in the same order.

An inbox has two places in turn. A card pushes reduction n + 2 after its kernel n + 1 is over, thus after all parts of
n + 1 came, which a peer pushes after its kernel n is over and has read all of the place. A block pushes all before it
waits, and all blocks fit on the multiprocessors at once: none waits for one that cannot start.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.card_sums.exchange import MOST_ROWS, NUMBERS, PLACES
from pallas_kernels.decode_step import instructions as d
from pallas_kernels.kv_attention import warp as w

SHARED_BYTES = 128  # a float a warp


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a launch; a block takes a row, without a norm perhaps a part of one.

    Attributes:
        rows: M.
        width: D.
        cards: of the sum.
        epsilon: of the norm, or None for none.
    """

    rows: int
    width: int
    cards: int
    epsilon: float | None

    @property
    def pieces(self) -> int:
        """Of a row: 8 columns, one thread's work."""
        return self.width // 8

    @property
    def warpgroups(self) -> int:
        if self.epsilon is not None:
            return -(-self.pieces // 128)
        return next(n for n in (1, 2, 4, 8) if self.rows * -(-self.pieces // (128 * n)) <= NUMBERS)

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def parts(self) -> int:
        """Blocks a row."""
        return -(-self.pieces // self.threads)

    @property
    def blocks(self) -> int:
        return self.rows * self.parts

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the operands."""
        return ("share", "hidden", "addresses", *(("scale", "layer") if self.epsilon is not None else ()))

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results, bfloat16 [M, D]."""
        return ("sum", "normed") if self.epsilon is not None else ("sum",)


def emit(plan: Plan, pointers, shared, block):
    """The kernel of one thread. `pointers`: operands and results by name; `shared`: `SHARED_BYTES`, for a norm."""
    thread, row = d.thread_in_block(), w.idiv(block, plan.parts)
    wanted = w.iadd(w.imul(w.irem(block, plan.parts), plan.threads), thread)
    exists = w.less(wanted, plan.pieces)
    piece = w.imin(wanted, plan.pieces - 1)  # threads past the end read the last again, and write nothing
    place = w.imul(w.iadd(w.imul(row, plan.pieces), piece), 16)
    share, hidden = (w.load_words(pointers[name], place, 4) for name in ("share", "hidden"))
    scale = []
    if plan.epsilon is not None:  # read here: nothing later waits for memory of this card
        at = w.element(pointers["scale"], w.imul(w.load_words(pointers["layer"], 0, 1)[0], plan.width), 4)
        scale = [x for n in (0, 16) for x in w.load_floats(at, w.iadd(w.imul(piece, 32), n), 4)]

    rank = w.load_words(pointers["addresses"], 0, 1)[0]
    numbers, inbox, *others = (d.load_pointer(pointers["addresses"], 8 * n) for n in range(1, plan.cards + 2))
    number = d.load_fresh(numbers, w.imul(block, 4), 1)[0]

    def word(inbox, card):
        line = w.iadd(w.imul(w.iadd(w.imul(w.irem(number, PLACES), plan.cards), card), MOST_ROWS), row)
        return w.element(inbox, w.iadd(w.imul(line, 2 * plan.pieces), piece), 16)

    apart = 16 * plan.pieces  # the halves of a piece
    w.when(exists, lambda: [d.push_four(word(other, rank), apart, share, number) for other in others])
    totals = None
    for card in range(plan.cards):
        mine = w.equal(rank, card)
        theirs = d.await_four(mine, word(inbox, w.i32(card)), apart, number)
        part = [w.select(mine, a, b) for a, b in zip(share, theirs, strict=True)]
        totals = _floats(part) if totals is None else _sums(totals, _floats(part))
    words = _words(_sums(_floats(hidden), _floats(_words(totals))))
    w.when(exists, lambda: w.store_words(pointers["sum"], place, words))

    if plan.epsilon is not None:
        total = _squares(plan, shared, thread, _floats(words), exists)  # meets the block
        inverse = d.reciprocal_sqrt(w.fma(total, w.f32(1 / plan.width), w.f32(plan.epsilon)))
        normed = _words([w.mul(w.mul(x, inverse), s) for x, s in zip(_floats(words), scale, strict=True)])
        w.when(exists, lambda: w.store_words(pointers["normed"], place, normed))
    else:
        d.meet(0, plan.threads)

    copy = w.iadd(w.imul(thread, plan.blocks), block)  # all threads have read the block's by now
    w.when(w.less(copy, NUMBERS), lambda: w.store_words(numbers, w.imul(copy, 4), [w.iadd(number, 1)]))


def _floats(words):
    return [value for word in words for value in w.unpack(word, "bf16")]


def _words(floats):
    return [w.pack(low, high, "bf16") for low, high in zip(floats[::2], floats[1::2], strict=True)]


def _sums(a, b):
    return [w.add(x, y) for x, y in zip(a, b, strict=True)]


def _squares(plan: Plan, shared, thread, values, exists):
    """The sum of the squares of the block's row."""
    warp, lane, squares = w.idiv(thread, 32), w.irem(thread, 32), w.f32(0.0)
    for value in values:
        squares = w.fma(value, value, squares)
    total = w.float_warp_sum(w.select(exists, squares, w.f32(0.0)))
    w.when(w.equal(lane, 0), lambda: w.store_floats(shared, w.imul(warp, 4), [total]))
    d.meet(0, plan.threads)
    warps = plan.threads // 32
    [of_warp] = w.load_floats(shared, w.imul(w.imin(lane, warps - 1), 4), 1)
    return w.float_warp_sum(w.select(w.less(lane, warps), of_warp, w.f32(0.0)))


@functools.cache
def build(plan: Plan):
    """f(*operands in the order of `plan.inputs`) → results in the order of `plan.results`."""
    order = (*plan.inputs, *plan.results)

    def body(*refs):
        refs, memory = refs[: len(order)], refs[len(order) :]

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * (len(order) + len(memory))))
        def run(ctx, block, *refs):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in refs]
            shared = pointers.pop() if memory else None
            emit(plan, dict(zip(order, pointers, strict=True)), shared, block.registers.item())

        run(lax.axis_index("block"), *refs, *memory)

    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((plan.rows, plan.width), jnp.bfloat16) for _ in plan.results),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((SHARED_BYTES,), jnp.uint8)] if plan.epsilon is not None else [],
        compiler_params=plgpu.CompilerParams(
            approx_math=False, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="card_sums",
    )
