"""A NumPy twin of `pallas_kernels.kv_attention.warp`: the kernels' inline code runs on a CPU, each instruction as is.

A value is an array over the 128 threads of a warpgroup, in lockstep; a pointer is bytes and an offset a thread. Put
this module in a kernel module's place of `w` and call its functions on such values. Memory is watched: a byte that one
thread wrote and another reads or writes, or one read and another writes, with no barrier of both between, raises
`Race`.
"""

import contextlib

import numpy as np

from tests.pallas_kernels.thread_values import *  # noqa: F403  the kernels' `w` is this module
from tests.pallas_kernels.thread_values import FLOATS, add, pairs, word

THREADS = 128
_LANE, _WARP = np.arange(THREADS) % 32, np.arange(THREADS) // 32
_active = [np.ones(THREADS, bool)]
_clock = {"group": 0, "warp": 0}


class Race(Exception):
    """Two threads touched a byte without a barrier between."""


class Memory:
    """Bytes with a watch over who touched them last, and when."""

    def __init__(self, array):
        self.bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        self.write, self.read = (np.full((3, len(self.bytes)), -1, np.int64) for _ in range(2))  # thread, clocks

    def as_array(self, dtype, shape):
        """A copy of the contents."""
        return self.bytes.view(dtype).reshape(shape).copy()

    def _check(self, past, at, thread):
        other, group, warp = past[:, at]
        same_warp = other // 32 == thread // 32
        apart = (group < _clock["group"]) | (same_warp & (warp < _clock["warp"])) | (other == thread) | (other < 0)
        if not apart.all():
            raise Race(f"byte {at[~apart][0]}: threads {other[~apart][0]} and {thread[~apart][0]}")

    def load(self, offset, size):
        """[128, size] bytes; threads that are switched off read zeros."""
        on = _active[-1]
        at = offset[:, None] + np.arange(size)
        assert ((at >= 0) & (at < len(self.bytes)))[on].all(), "a load outside its memory"
        flat, thread = at[on].ravel(), np.repeat(np.flatnonzero(on), size)
        self._check(self.write, flat, thread)
        self.read[:, flat] = thread, np.full_like(thread, _clock["group"]), np.full_like(thread, _clock["warp"])
        result = np.zeros((THREADS, size), np.uint8)
        result[on] = self.bytes[at[on]]
        return result

    def store(self, offset, data):
        """Stores [128, size] bytes; threads may share a place only if they store the same."""
        on, size = _active[-1], data.shape[1]
        at = offset[:, None] + np.arange(size)
        assert ((at >= 0) & (at < len(self.bytes)))[on].all(), "a store outside its memory"
        flat, thread = at[on].ravel(), np.repeat(np.flatnonzero(on), size)
        self._check(self.write, flat, thread)
        self._check(self.read, flat, thread)
        self.bytes[flat] = data[on].ravel()
        if not (self.bytes[flat] == data[on].ravel()).all():
            raise Race("threads store different things in one place")
        self.write[:, flat] = thread, np.full_like(thread, _clock["group"]), np.full_like(thread, _clock["warp"])


class Pointer:
    """Memory and a byte offset a thread."""

    def __init__(self, memory, at=0):
        self.memory, self.at = memory, np.broadcast_to(np.asarray(at, np.int64), (THREADS,))


@contextlib.contextmanager
def _only(mask):
    _active.append(_active[-1] & mask)
    try:
        yield
    finally:
        _active.pop()


def i32(value):
    return np.full(THREADS, value & 0xFFFFFFFF, np.uint32).view(np.int32)


def f32(value):
    return np.full(THREADS, value, np.float32)


def idiv(a, b):
    return (word(a).view(np.uint32) // word(b).view(np.uint32)).astype(np.int32)


def irem(a, b):
    return (word(a).view(np.uint32) % word(b).view(np.uint32)).astype(np.int32)


def mma(acc, a, b, half):
    """Row g or g + 8, depth 2t + {0, 1} or + 8; see the PTX manual, m16n8k16."""
    g, t = _LANE // 4, _LANE % 4
    left, right, total = np.zeros((4, 16, 16)), np.zeros((4, 16, 8)), np.zeros((4, 16, 8))
    for index, half_words in enumerate(a):
        for e in range(2):
            left[_WARP, g + index % 2 * 8, 2 * t + e + index // 2 * 8] = pairs(half_words, half)[:, e]
    for index, half_words in enumerate(b):
        for e in range(2):
            right[_WARP, 2 * t + e + index * 8, g] = pairs(half_words, half)[:, e]
    for index, value in enumerate(acc):
        total[_WARP, g + index // 2 * 8, 2 * t + index % 2] = value
    with np.errstate(all="ignore"):
        total = (total + left @ right).astype(np.float32)
    return tuple(total[_WARP, g + index // 2 * 8, 2 * t + index % 2] for index in range(4))


def transpose(word):
    g, t = _LANE // 4, _LANE % 4
    halves, matrix = pairs(word, "f16").view(np.uint16), np.zeros((4, 8, 8), np.uint16)
    for e in range(2):
        matrix[_WARP, g, 2 * t + e] = halves[:, e]
    turned = np.stack([matrix[_WARP, 2 * t + e, g] for e in range(2)], axis=1)
    return np.ascontiguousarray(turned).view(np.int32)[:, 0]


def shuffle_xor(x, distance):
    return x[np.arange(THREADS) ^ distance]


def float_warp_sum(x):
    for distance in (16, 8, 4, 2, 1):
        x = add(x, shuffle_xor(x, distance))
    return x


def shuffle_up(x, distance):
    return np.where(_LANE >= distance, x[np.maximum(np.arange(THREADS) - distance, 0)], 0).astype(np.int32)


def broadcast(x, lane):
    return x[_WARP * 32 + lane]


def warp_sum(x):
    return np.repeat(x.reshape(4, 32).sum(1), 32).astype(np.int32)


def warp_max(x):
    return np.repeat(x.reshape(4, 32).max(1), 32)


def any_lane(condition):
    return np.repeat(condition.reshape(4, 32).any(1), 32)


def warp_barrier():
    _clock["warp"] += 1


def warpgroup_barrier():
    assert _active[-1].all(), "a barrier that some threads skip"
    _clock["group"] += 1
    _clock["warp"] += 1


def fence_device():
    pass


def thread_index():
    return np.arange(THREADS, dtype=np.int32)


def offset(pointer, byte_offset):
    return Pointer(pointer.memory, pointer.at + word(byte_offset))


def element(pointer, index, size):
    return Pointer(pointer.memory, pointer.at + np.int64(word(index)) * size)


def _load(pointer, byte_offset, size, dtype, alignment=None):
    at = offset(pointer, byte_offset).at
    assert (at % (alignment or size) == 0)[_active[-1]].all(), "a misaligned load"
    return pointer.memory.load(at, size).view(dtype)


def _store(pointer, byte_offset, data):
    data = np.ascontiguousarray(data)
    data = data.reshape(THREADS, -1).view(np.uint8)
    at = offset(pointer, byte_offset).at
    assert (at % data.shape[1] == 0)[_active[-1]].all(), "a misaligned store"
    pointer.memory.store(at, data)


def load_words(pointer, byte_offset, count):
    return list(np.ascontiguousarray(_load(pointer, byte_offset, 4 * count, np.int32).T))


def store_words(pointer, byte_offset, words):
    _store(pointer, byte_offset, np.stack([np.asarray(word, np.int32) for word in words], axis=1))


def load_floats(pointer, byte_offset, count=1):
    return [word.view(np.float32) for word in load_words(pointer, byte_offset, count)]


def store_floats(pointer, byte_offset, values):
    store_words(pointer, byte_offset, [value.view(np.int32) for value in values])


def load_float_of(pointer, byte_offset, dtype):
    kind = np.dtype(FLOATS[dtype])
    return _load(pointer, byte_offset, kind.itemsize, kind)[:, 0].astype(np.float32)


def store_float_as(pointer, byte_offset, value, dtype):
    with np.errstate(all="ignore"):
        _store(pointer, byte_offset, value.astype(FLOATS[dtype]))


def store_byte(pointer, byte_offset, value):
    _store(pointer, byte_offset, value.astype(np.uint8))


def load_device(pointer, byte_offset, count):
    return load_floats(pointer, byte_offset, count)


def increment_or_wrap(pointer, limit):
    [thread] = np.flatnonzero(_active[-1])
    words = pointer.memory.bytes.view(np.uint32)
    at = pointer.at[thread] // 4
    before = words[at]
    words[at] = 0 if before >= limit[thread] else before + 1
    return i32(int(before))


def when(condition, body):
    if condition is None:
        body()
    elif (_active[-1] & condition).any():
        with _only(condition):
            body()


def branch(condition, then, otherwise, count):
    with _only(condition):
        yes = then()
    with _only(~condition):
        no = otherwise()
    assert len(yes) == len(no) == count
    return [np.where(condition, a, b) for a, b in zip(yes, no, strict=True)]


def loop(count, step, begin, body):
    assert (count == count[0]).all()
    carried = list(begin)
    for index in range(0, int(count[0]), step):
        carried = body(i32(index), carried)
    return carried
