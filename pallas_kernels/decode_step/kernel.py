"""The launch: one block a multiprocessor, all resident; warps that compute and four that copy."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.group import Group
from pallas_kernels.decode_step.layer import consume
from pallas_kernels.decode_step.loader import load
from pallas_kernels.decode_step.plan import Plan
from pallas_kernels.kv_attention import warp as w

CACHE = ("keys", "values", "key_scales", "key_minimums", "value_scales", "value_minimums")


def emit(plan: Plan, pointers, shared_base, block):
    """The kernel of one thread. `pointers`: operands, results and cache by name; `shared_base`: all shared memory."""
    offsets, _ = plan.regions()
    shared = {name: w.offset(shared_base, at) for name, at in offsets.items()}
    thread = d.thread_in_block()
    warp, lane = w.broadcast(w.idiv(thread, 32), 0), w.irem(thread, 32)

    def prepare():
        for slot in range(plan.slots):
            d.barrier_init(w.offset(shared["full"], 8 * slot), 1)
            d.barrier_init(w.offset(shared["empty"], 8 * slot), 1)
        w.store_words(shared["zero"], 0, [w.i32(0)])
        d.barriers_ready()

    w.when(w.equal(thread, 0), prepare)
    d.meet(0, 32 * plan.warps + 128)
    loader = w.iadd(warp, -plan.warps)
    w.when(w.less(-1, loader), lambda: load(plan, pointers, shared, loader, lane, block))
    w.when(w.less(warp, plan.warps), lambda: consume(plan, pointers, shared, block, warp, lane))


def result_shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """The kernel's results: hidden, and what its phases hand to each other."""
    B, parts = plan.batch, plan.items * plan.splits
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    attended = {"partial": f32((parts, plan.share, plan.head_dim)), "statistics": f32((parts, plan.share, 2))}
    if "output" in plan.unstaged:
        attended = {"attended": bf16((B, plan.heads * plan.head_dim))}
    return {
        "hidden": bf16((B, plan.hidden)),
        "mid": bf16((B, plan.hidden)),
        "qkv": bf16((B, plan.matrix("qkv").out_features)),
        "act": bf16((B, plan.inner)),
        **attended,
    }


@functools.lru_cache(maxsize=64)
def build(plan: Plan, names: tuple[str, ...], cached: tuple[str, ...], group: Group | None = None):
    """f(*operands in the order of `names`, *refs in the order of `cached`) → results of `result_shapes`.

    `group`: under a `shard_map`, the cards that hold shares of the layers; `cached` then ends with "inbox".
    """
    results = result_shapes(plan)
    _, size = plan.regions()

    def body(*refs):
        *refs, memory = refs
        order = (*names, *cached, *results)
        assert len(refs) == len(order)

        numbers = [lax.axis_index("block")]
        if group is not None:
            numbers += [lax.axis_index(group.axis), group.first()]

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (len(order) + 1), *[plgpu.Layout.WG_SPLAT] * len(numbers)))
        def run(ctx, *values):
            refs, memory, numbers = values[: len(order)], values[len(order)], values[len(order) + 1 :]
            block, *place = [number.registers.item() for number in numbers]
            pointers = {name: utils.memref_ptr(ref) for name, ref in zip(order, refs, strict=True)}
            if group is not None:
                inbox = refs[order.index("inbox")]
                rank, first = place

                def inbox_of(card: int):
                    return utils.memref_ptr(ctx.to_remote(inbox, w.iadd(first, card * group.stride)))

                pointers |= {"rank": rank, "inbox_of": inbox_of}
            emit(plan, pointers, utils.memref_ptr(memory), block)

        run(*refs, memory, *numbers)

    return plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warps // 4 + 1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((size,), jnp.uint8)],
        compiler_params=plgpu.CompilerParams(
            approx_math=False, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="decode_step",
    )
