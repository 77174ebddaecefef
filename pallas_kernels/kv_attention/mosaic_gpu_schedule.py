"""How decode attention's work is divided among blocks.

The tiles of all slots and heads form one list, slot after slot, head after head; block i of W takes the i-th of W
parts, equal to within a tile. Everything follows from the lengths on the device, so ragged batches stay balanced and
nothing is recompiled.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_fragments import scalar


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Static facts of the division.

    Its methods are for use inside a kernel, where jax.numpy's `//`, `%` and `where` do not lower if the arrays come
    with a mesh (they reshard their constants): hence lax.div, lax.rem and sums.

    Attributes:
        slots: B.
        kv_heads: G.
        length: S, room of a slot.
        tokens: tokens a tile.
        workers: W, blocks.
        window: sliding window, or None.
    """

    slots: int
    kv_heads: int
    length: int
    tokens: int
    workers: int
    window: int | None

    def tiles_of(self, lengths, slot):
        """(tiles, first tile) of each item of a slot, from the lengths' reference."""
        valid = lax.clamp(1, lengths[lax.min(slot, self.slots - 1)], self.length)
        first = jnp.int32(0) if self.window is None else lax.div(lax.max(valid - self.window, 0), self.tokens)
        return lax.div(valid + self.tokens - 1, self.tokens) - first, first

    def advance(self, lengths, cursor):
        """The next place in the list of a cursor (slot, head, tile, tiles of the item, first tile)."""
        slot, head, tile, count, first = cursor
        wrap = (tile + 1 >= count).astype(jnp.int32)
        head = head + wrap
        leave = head >= self.kv_heads
        leaving = leave.astype(jnp.int32)
        slot = slot + leaving
        # Lengths are read only when the slot changes: the load's latency would be in every tile's way.
        count, first = lax.cond(leave, lambda: self.tiles_of(lengths, slot), lambda: (count, first))
        return slot, head * (1 - leaving), (tile + 1) * (1 - wrap), count, first

    def first_of(self, worker, total):
        """The first tile of a worker's part of `total`: floor(worker · total / active), kept within 32 bits.

        `active` is the number of workers, or of tiles where these are fewer: every active worker then has a tile, which
        counting an item's slices by the distance of its first and last worker relies on.
        """
        active = lax.min(total, self.workers)
        worker = lax.min(worker, active)
        return worker * lax.div(total, active) + lax.div(worker * lax.rem(total, active), active)

    def worker_of(self, tile, total):
        """Whose part a tile lies in."""
        return lax.div((tile + 1) * lax.min(total, self.workers) - 1, total)

    @property
    def fits(self) -> bool:
        """Whether the arithmetic above stays within 32 bits."""
        most = self.slots * self.kv_heads * -(-self.length // self.tokens)
        return (most + 1) * self.workers < 2**31


def locate_portable(schedule: Schedule, lengths, worker):
    """(total tiles, slot of the worker's first tile, tiles before that slot); by two loops over the slots."""

    def count(slot, total):
        return total + schedule.kv_heads * schedule.tiles_of(lengths, slot)[0]

    total = lax.fori_loop(0, schedule.slots, count, jnp.int32(0))
    begin = schedule.first_of(worker, total)

    def find(slot, carry):
        found, before, seen = carry
        seen = count(slot, seen)
        past = begin >= seen
        return jnp.where(past, slot + 1, found), jnp.where(past, seen, before), seen

    zero = jnp.int32(0)
    found, before, _ = lax.fori_loop(0, schedule.slots, find, (zero, zero, zero))
    return total, found, before


def locate(schedule: Schedule, lengths, worker):
    """The same by a prefix sum over a warp's lanes, 32 slots at once."""
    number = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=[number] * 3)
    def emit(ctx, lengths, worker):
        del ctx
        values = locate_values(schedule, utils.memref_ptr(lengths), scalar(worker))
        return [mgpu.FragmentedArray.splat(value, (), is_signed=True) for value in values]

    return tuple(emit(lengths, worker))


def locate_values(schedule: Schedule, lengths, worker):
    """`locate` on values of a thread."""
    lane = w.irem(w.thread_index(), 32)
    total, reached = w.i32(0), []
    for first in range(0, schedule.slots, 32):
        slot = w.iadd(lane, first)
        valid = w.load_words(lengths, w.imul(w.imin(slot, schedule.slots - 1), 4), 1)[0]
        valid = w.imin(w.imax(valid, 1), schedule.length)
        tiles = w.idiv(w.iadd(valid, schedule.tokens - 1), schedule.tokens)
        if schedule.window is not None:
            tiles = w.iadd(tiles, w.imul(w.idiv(w.imax(w.iadd(valid, -schedule.window), 0), schedule.tokens), -1))
        tiles = w.select(w.less(slot, schedule.slots), w.imul(tiles, schedule.kv_heads), w.i32(0))
        for distance in (1, 2, 4, 8, 16):
            tiles = w.iadd(tiles, w.shuffle_up(tiles, distance))
        tiles = w.iadd(tiles, total)
        total = w.broadcast(tiles, 31)
        reached.append((slot, tiles))
    active = w.imin(total, schedule.workers)  # as in first_of
    worker = w.imin(worker, active)
    begin = w.iadd(w.imul(worker, w.idiv(total, active)), w.idiv(w.imul(worker, w.irem(total, active)), active))
    found, before = w.i32(0), w.i32(0)
    for slot, tiles in reached:
        past = w.both(w.less(slot, schedule.slots), w.less(tiles, w.iadd(begin, 1)))
        found = w.iadd(found, w.select(past, w.i32(1), w.i32(0)))
        before = w.imax(before, w.select(past, tiles, w.i32(0)))
    return total, w.warp_sum(found), w.warp_max(before)
