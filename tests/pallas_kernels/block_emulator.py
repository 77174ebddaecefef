"""A NumPy emulation of whole grids: every warp runs a kernel's inline code by itself, meeting others as on a card.

Stands in for `kv_attention.warp` (the class `Warp`'s functions) and `decode_step.instructions`. A value is an array
over the 32 lanes of a warp; a pointer is bytes and an offset a lane. Warps take turns where they wait; copies land
late and in a random order; a wait that nothing can end raises `Deadlock`.
"""

import contextlib
import threading

import ml_dtypes
import numpy as np

from tests.pallas_kernels.thread_values import *  # noqa: F403  the kernels' `w` is this module
from tests.pallas_kernels.thread_values import FLOATS, add, pairs, word

LANES = 32
_LANE = np.arange(LANES)
_here = threading.local()


class Deadlock(Exception):
    """Every warp waits."""


class Memory:
    """Bytes."""

    def __init__(self, array):
        self.bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()

    def as_array(self, dtype, shape):
        """A view of the contents."""
        return self.bytes.view(dtype).reshape(shape)


class Pointer:
    """Memory and a byte offset a lane; after `pick` the memories may differ by lane."""

    def __init__(self, memory, at=0):
        self.memory = memory if isinstance(memory, list) else [memory] * LANES
        self.at = np.broadcast_to(np.asarray(at, np.int64), (LANES,))


class Barrier:
    """An mbarrier."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.bytes, self.phase = 0, 0

    def settle(self):
        """Completes the phase if nothing is outstanding."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals


class Grid:
    """Runs `body(block, pointers, shared pointer)` on every warp of every block."""

    def __init__(self, blocks, warps, shared_bytes, body, seed=0):
        self.random, self.stubborn = np.random.default_rng(seed), seed % 2 == 1
        self.copies, self.warps, self.error = [], [], None
        self.turn = threading.Semaphore(0)
        for block in range(blocks):
            shared = Memory(np.full(shared_bytes, 0xFF, np.uint8))
            facts = dict(barriers={}, named={}, shared=shared)
            for warp in range(warps):
                self.warps.append(_Warp(self, block, warp, facts, body))

    def run(self):
        """To the end."""
        for warp in self.warps:
            warp.thread.start()
        alive = list(self.warps)
        while alive:
            progress = False
            for warp in self.random.permutation(len(alive)):
                warp = alive[warp]
                if warp.waiting is not None and not warp.waiting():
                    continue
                progress, warp.waiting = True, None
                warp.resume.release()
                self.turn.acquire()
                if self.error is not None:
                    raise self.error
                if not self.stubborn and self.random.random() < 0.3:
                    self.land()
            alive = [warp for warp in alive if not warp.done]
            if not progress and not self.land(every=True) and alive:
                waits = {(warp.block, warp.index): warp.why for warp in alive}
                raise Deadlock(f"{len(alive)} warps wait: {dict(list(waits.items())[:12])}")

    def land(self, every=False):
        """Finishes some of the copies in flight, or one where nothing else can go on; whether there were any.

        Odd seeds: the newest first and none before it must, so that a copy may be overtaken by all that follow it.
        """
        count = min(len(self.copies), 1) if every else int(self.random.integers(0, len(self.copies) + 1))
        for _ in range(count):
            which = -1 if self.stubborn else int(self.random.integers(0, len(self.copies)))
            target, at, data, barrier = self.copies.pop(which)
            target.bytes[at : at + len(data)] = data
            if barrier is not None:  # None: a push to another card
                barrier.bytes -= len(data)
                barrier.settle()
        return count > 0


class _Warp:
    def __init__(self, grid, block, index, facts, body):
        self.grid, self.block, self.index, self.facts = grid, block, index, facts
        self.waiting = self.why = None
        self.done, self.active = False, [np.ones(LANES, bool)]
        self.resume = threading.Semaphore(0)

        def work():
            self.resume.acquire()
            _here.warp = self
            try:
                body(block, Pointer(facts["shared"]))
            except BaseException as error:  # handed to whoever runs the grid
                grid.error = error
            self.done = True
            grid.turn.release()

        self.thread = threading.Thread(target=work, daemon=True)

    def wait(self, condition, why):
        """Lets others run until the condition holds."""
        if condition():
            return
        self.waiting, self.why = condition, why
        self.grid.turn.release()
        self.resume.acquire()


def _on():
    return _here.warp.active[-1]


@contextlib.contextmanager
def _only(mask):
    _here.warp.active.append(_on() & mask)
    try:
        yield
    finally:
        _here.warp.active.pop()


def _first(values):
    """The value that all active lanes share."""
    [found] = set(np.asarray(values)[_on()].tolist())
    return found


# -- kv_attention.warp ---------------------------------------------------------------------------------------------


def i32(value):
    return np.full(LANES, value & 0xFFFFFFFF, np.uint32).view(np.int32)


def f32(value):
    return np.full(LANES, value, np.float32)


def _divided(operation):
    def apply(a, b):
        a, b = word(a), word(b)
        assert ((a >= 0) & (b > 0))[_on()].all(), "unsigned division of a negative number"
        return operation(a.view(np.uint32), np.where(b == 0, 1, b).view(np.uint32)).astype(np.int32)

    return apply


idiv, irem = _divided(np.floor_divide), _divided(np.remainder)


def mma(acc, a, b, half):
    g, t = _LANE // 4, _LANE % 4
    left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for index, half_words in enumerate(a):
        for e in range(2):
            left[g + index % 2 * 8, 2 * t + e + index // 2 * 8] = pairs(half_words, half)[:, e]
    for index, half_words in enumerate(b):
        for e in range(2):
            right[2 * t + e + index * 8, g] = pairs(half_words, half)[:, e]
    for index, value in enumerate(acc):
        total[g + index // 2 * 8, 2 * t + index % 2] = value
    with np.errstate(all="ignore"):
        total = (total + left @ right).astype(np.float32)
    return tuple(total[g + index // 2 * 8, 2 * t + index % 2] for index in range(4))


def transpose(word):
    g, t = _LANE // 4, _LANE % 4
    halves, matrix = pairs(word, "f16").view(np.uint16), np.zeros((8, 8), np.uint16)
    for e in range(2):
        matrix[g, 2 * t + e] = halves[:, e]
    return np.ascontiguousarray(np.stack([matrix[2 * t + e, g] for e in range(2)], axis=1)).view(np.int32)[:, 0]


def shuffle_xor(x, distance):
    warp_barrier()
    return x[_LANE ^ distance]


def float_warp_sum(x):
    for distance in (16, 8, 4, 2, 1):
        x = add(x, shuffle_xor(x, distance))
    return x


def broadcast(x, lane):
    return np.full(LANES, x[lane], np.int32)


def warp_barrier():
    assert _on().all(), "a barrier that some lanes skip"


def fence_device():
    pass


def offset(pointer, byte_offset):
    return Pointer(pointer.memory, pointer.at + word(byte_offset))


def element(pointer, index, size):
    return Pointer(pointer.memory, pointer.at + np.int64(word(index)) * size)


def _load(pointer, byte_offset, size, dtype):
    place, result = offset(pointer, byte_offset), np.zeros((LANES, size), np.uint8)
    for lane in np.flatnonzero(_on()):
        at, memory = place.at[lane], place.memory[lane]
        assert at % size == 0 and 0 <= at <= len(memory.bytes) - size, "a load misaligned or outside its memory"
        result[lane] = memory.bytes[at : at + size]
    return result.view(dtype)


def _store(pointer, byte_offset, data):
    place, data = offset(pointer, byte_offset), np.ascontiguousarray(data).reshape(LANES, -1).view(np.uint8)
    size = data.shape[1]
    for lane in np.flatnonzero(_on()):
        at, memory = place.at[lane], place.memory[lane]
        assert at % size == 0 and 0 <= at <= len(memory.bytes) - size, "a store misaligned or outside its memory"
        memory.bytes[at : at + size] = data[lane]


def load_words(pointer, byte_offset, count):
    return list(np.ascontiguousarray(_load(pointer, byte_offset, 4 * count, np.int32).T))


def store_words(pointer, byte_offset, words):
    _store(pointer, byte_offset, np.stack([np.asarray(word, np.int32) for word in words], axis=1))


def load_floats(pointer, byte_offset, count=1):
    return [word.view(np.float32) for word in load_words(pointer, byte_offset, count)]


def store_floats(pointer, byte_offset, values):
    store_words(pointer, byte_offset, [np.asarray(value, np.float32).view(np.int32) for value in values])


def load_float_of(pointer, byte_offset, dtype):
    kind = np.dtype(FLOATS[dtype])
    return _load(pointer, byte_offset, kind.itemsize, kind)[:, 0].astype(np.float32)


def store_float_as(pointer, byte_offset, value, dtype):
    with np.errstate(all="ignore"):
        _store(pointer, byte_offset, value.astype(FLOATS[dtype]))


def store_byte(pointer, byte_offset, value):
    _store(pointer, byte_offset, value.astype(np.uint8))


def increment_or_wrap(pointer, limit):
    [lane] = np.flatnonzero(_on())
    words, at = pointer.memory[lane].bytes.view(np.uint32), pointer.at[lane] // 4
    before = words[at]
    words[at] = 0 if before >= limit[lane] else before + 1
    return i32(int(before))


def when(condition, body):
    if condition is None:
        body()
    elif (_on() & condition).any():
        with _only(condition):
            body()


def loop(count, step, begin, body):
    carried, count = list(begin), _first(count)
    for index in range(0, count, step):
        carried = list(body(i32(index), carried))
    return carried


# -- decode_step.instructions --------------------------------------------------------------------------------------


def thread_in_block():
    return (_here.warp.index * LANES + _LANE).astype(np.int32)


def load_matrices(pointer, byte_offset):
    place, results = offset(pointer, byte_offset), []
    for matrix in range(4):
        source = place.at[8 * matrix + _LANE // 4] + 4 * (_LANE % 4)
        results.append(load_words(Pointer(place.memory, source), 0, 1)[0])
    return results


def masked_or(word, mask, other):
    return ((word.view(np.uint32) & np.uint32(mask)) | np.uint32(other)).view(np.int32)


def masked_xor(word, mask, other):
    return ((word.view(np.uint32) & np.uint32(mask)) ^ np.uint32(other)).view(np.int32)


def shift_right(word, count):
    return (word.view(np.uint32) >> np.uint32(count)).view(np.int32)


def subtract_bf16x2(a, b):
    difference = pairs(a, "bf16").astype(np.float32) - pairs(b, "bf16").astype(np.float32)
    return np.ascontiguousarray(difference.astype(ml_dtypes.bfloat16)).view(np.int32)[:, 0]


def float_of_byte(pointer, byte_offset):
    return _load(pointer, byte_offset, 1, np.uint8)[:, 0].astype(np.float32)


def reciprocal_sqrt(x):
    with np.errstate(all="ignore"):
        return (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)


load_fresh = load_words


def load_fresh_if(condition, pointer, byte_offset):
    with _only(condition):
        return load_words(pointer, byte_offset, 4)


barriers_ready = fence_copies = fence_all = fence_device


def pick(condition, a, b):
    condition = np.broadcast_to(condition, (LANES,))
    memory = [x if yes else y for yes, x, y in zip(condition, a.memory, b.memory, strict=True)]
    return Pointer(memory, np.where(condition, a.at, b.at))


def load_volatile(pointer):
    return load_words(pointer, 0, 1)[0]


def _barrier(pointer):
    lane = np.flatnonzero(_on())[0]
    return _here.warp.facts["barriers"], int(pointer.at[lane])


def barrier_init(pointer, arrivals):
    barriers, at = _barrier(pointer)
    barriers[at] = Barrier(arrivals)


def barrier_expect(pointer, bytes_):
    assert _on().sum() == 1
    barriers, at = _barrier(pointer)
    barriers[at].bytes += _first(bytes_)
    barrier_arrive(pointer)


def barrier_arrive(pointer):
    assert _on().sum() == 1
    barriers, at = _barrier(pointer)
    barrier = barriers[at]
    barrier.pending -= 1
    assert barrier.pending >= 0, "more arrivals than the barrier takes"
    barrier.settle()


def barrier_wait(pointer, parity):
    barriers, at = _barrier(pointer)
    barrier, parity = barriers[at], _first(parity)
    _here.warp.wait(lambda: barrier.phase % 2 != parity, ("barrier", at, parity))


def bulk_copy(target, source, bytes_, barrier):
    barriers, _ = _barrier(barrier)
    for lane in np.flatnonzero(_on()):
        size, at, start = int(bytes_[lane]), int(target.at[lane]), int(source.at[lane])
        memory = source.memory[lane]
        assert size % 16 == 0 and at % 16 == 0 and start % 16 == 0 and size > 0, "a copy that is not whole 16 bytes"
        assert 0 <= start <= len(memory.bytes) - size and 0 <= at <= len(target.memory[lane].bytes) - size
        data = memory.bytes[start : start + size].copy()
        _here.warp.grid.copies.append((target.memory[lane], at, data, barriers[int(barrier.at[lane])]))


def meet(name, threads):
    assert _on().all(), "a barrier that some lanes skip"
    state = _here.warp.facts["named"].setdefault(name, [0, 0])
    state[0] += 1
    if state[0] == threads // LANES:
        state[0], state[1] = 0, state[1] + 1
        return
    lap = state[1]
    _here.warp.wait(lambda: state[1] != lap, ("meet", name))


def count_up(pointer):
    [lane] = np.flatnonzero(_on())
    pointer.memory[lane].bytes.view(np.uint32)[pointer.at[lane] // 4] += 1


def await_count(pointer, target):
    [lane] = np.flatnonzero(_on())
    words, at, goal = pointer.memory[lane].bytes.view(np.uint32), pointer.at[lane] // 4, int(target[lane])
    _here.warp.wait(lambda: words[at] >= goal, ("count", goal))


def store_word(pointer, value):
    store_words(pointer, 0, [value])


# -- other cards -----------------------------------------------------------------------------------------------------

addresses: dict[int, Memory] = {}  # what a 64-bit address of global memory stands for


def load_pointer(pointer, byte_offset):
    found = _load(pointer, byte_offset, 8, np.int64)[:, 0]
    return Pointer([addresses.get(int(address)) for address in found])


def push(pointer, value, number):
    """Lands late, as copies do; a word that is still on its way must not be written again."""
    copies = _here.warp.grid.copies
    for lane in np.flatnonzero(_on()):
        memory, at = pointer.memory[lane], int(pointer.at[lane])
        assert at % 8 == 0 and 0 <= at <= len(memory.bytes) - 8, "a push misaligned or outside its memory"
        assert not any(target is memory and place == at for target, place, _, _ in copies), "two pushes on their way"
        both = np.array([np.asarray(value[lane]).view(np.int32), number[lane]], np.int32)
        copies.append((memory, at, both.view(np.uint8), None))


def push_four(pointer, apart, words, number):
    assert (pointer.at % 16 == 0)[_on()].all() and apart % 16 == 0
    for index, each in enumerate(words):
        push(offset(pointer, index // 2 * apart + index % 2 * 8), each, number)


def await_pushed(pointer, number):
    """Waits until a warp's words hold the number."""
    return _await([pointer], number)[0].view(np.float32)


def await_four(skip, pointer, apart, number):
    with _only(~np.broadcast_to(skip, (LANES,))):
        return _await([offset(pointer, index // 2 * apart + index % 2 * 8) for index in range(4)], number)


def _await(pointers, number):
    lanes, me = np.flatnonzero(_on()), _here.warp
    word_of = lambda pointer, lane: pointer.memory[lane].bytes[pointer.at[lane] :][:8].view(np.int32)  # noqa: E731
    there = lambda: all(word_of(p, lane)[1] == number[lane] for p in pointers for lane in lanes)  # noqa: E731
    if (me.block, me.index) == (0, 0):  # reads as late as can be: only when nobody else can go on
        others = [warp for warp in me.grid.warps if warp is not me]
        stuck = lambda: all(o.done or (o.waiting is not None and not o.waiting()) for o in others)  # noqa: E731
        me.wait(lambda: there() and stuck() and not me.grid.copies, "pushed, late")
    me.wait(there, ("pushed", number[lanes[:1]]))
    found = [np.zeros(LANES, np.int32) for _ in pointers]
    for lane in lanes:
        for values, pointer in zip(found, pointers, strict=True):
            values[lane] = word_of(pointer, lane)[0]
    return found
