"""The inline code of decode attention and append, run instruction by instruction on a NumPy emulation of a warpgroup.

Here is what the GPU interpreter cannot run: fragments, byte permutations, mma, the key bias's tables, the merging of
warps and of slices, and the prefix sum. Blocks run one after the other, driven as the kernel's own loop drives them.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.kv_attention import (
    mosaic_gpu_append,
    mosaic_gpu_fragments,
    mosaic_gpu_key_bias,
    mosaic_gpu_merge,
    mosaic_gpu_schedule,
    mosaic_gpu_tile,
    reference,
)
from pallas_kernels.kv_attention.mosaic_gpu_fragments import TileShape
from pallas_kernels.kv_attention.mosaic_gpu_schedule import Schedule
from pallas_kernels.kv_attention.tensor import KVArrays
from tests.pallas_kernels import warp_emulator as emulator

MODULES = (mosaic_gpu_append, mosaic_gpu_fragments, mosaic_gpu_key_bias, mosaic_gpu_merge, mosaic_gpu_schedule)
FLOATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    for module in (*MODULES, mosaic_gpu_tile):
        monkeypatch.setattr(module, "w", emulator)


def point(array):
    return emulator.Pointer(emulator.Memory(array))


def in_shared_memory(shape, rows):
    """A tile as TMA lays it out: rows of whole 128-byte segments with 16-byte pieces permuted by the row, or plain."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    if not mosaic_gpu_fragments.swizzled(shape):
        return point(raw)
    pieces = raw.reshape(len(rows) // 8, 8, -1, 8, 16)  # eight rows, segments, pieces
    moved = np.empty_like(pieces)
    for row in range(8):
        for piece in range(8):
            moved[:, row, :, piece ^ row] = pieces[:, row, :, piece]
    return point(moved.transpose(0, 2, 1, 3, 4))


def run_blocks(shape, schedule, query, kv, layer, lengths, bias):
    """What the kernel's blocks do, one after the other; bias: (bias_GK, cos, sin) or None. Returns [B·H, K]."""
    G, K, share, tokens = schedule.kv_heads, shape.head_dim, shape.share, shape.tokens
    items = schedule.slots * G
    tile = mosaic_gpu_tile.FastTile(shape)
    out = point(np.full((items * share, K), np.nan, FLOATS[shape.dtype]))
    partial = point(np.full((schedule.workers + items, share, K), np.nan, np.float32))
    statistics = point(np.full((schedule.workers + items, share, 2), np.nan, np.float32))
    counters, lengths_at = point(np.zeros(items, np.int32)), point(lengths)
    padded = -(-schedule.length // tokens) * tokens + tokens

    def rows(array, slot, head, base):
        whole = np.zeros((padded, *array.shape[4:]), array.dtype)  # TMA fills what lies past the end with zeros
        whole[: schedule.length] = array[layer, slot, head]
        return whole[base : base + tokens]

    number = emulator.i32
    for worker in range(schedule.workers):
        found = mosaic_gpu_schedule.locate_values(schedule, lengths_at, number(worker))
        total, slot, before = (int(value[0]) for value in found)
        assert all((value == value[0]).all() for value in found)
        begin, end = (int(schedule.first_of(who, jnp.int32(total))) for who in (worker, worker + 1))
        scratch = point(np.full(shape.scratch, np.nan, np.float32))
        terms = point(np.full((share, K // 2, 2), np.nan, np.float32))
        position = begin
        while position < end:
            every = schedule.tiles_of(jnp.asarray(lengths), jnp.arange(schedule.slots))
            counts, firsts = (np.broadcast_to(x, schedule.slots) for x in every)
            starts = np.concatenate([[0], np.cumsum(np.repeat(counts, G))])
            item = int(np.searchsorted(starts, position, side="right")) - 1
            if position == begin:
                assert slot == item // G and before == starts[slot * G]
            slot, head = divmod(item, G)
            count, first = int(counts[slot]), int(firsts[slot])
            index = position - int(starts[item])
            run = min(count - index, end - position)
            asked = point(query[slot].reshape(G, share, K)[head])
            if bias:
                tables = [point(table) for table in bias[1:]]
                table_slot = slot if len(bias[1]) > 1 else 0
                words = mosaic_gpu_key_bias.table(shape, *tables, number(table_slot), schedule.length)
                setup, state = tile._start(asked, (point(bias[0]), terms, number(head)))
            else:
                setup, state = tile._start(asked, None)
            valid = max(1, int(lengths[slot]))
            oldest = 0 if schedule.window is None else valid - schedule.window
            for step in range(index, index + run):
                base = (first + step) * tokens
                names = ("key_scales", "key_minimums", "value_scales", "value_minimums") if shape.quantized else ()
                tile_bias = ()
                if bias:
                    at = [point(table[table_slot, base]) for table in bias[1:]]
                    tile_bias = [words, *at, terms, scratch]
                state = tile._tile(
                    setup,
                    state,
                    in_shared_memory(shape, rows(kv.keys, slot, head, base)),
                    in_shared_memory(shape, rows(kv.values, slot, head, base)),
                    [point(rows(getattr(kv, name), slot, head, base)) for name in names],
                    (number(oldest - base), number(valid - base)),
                    tile_bias,
                )
                emulator.warpgroup_barrier()
            places = number(item * share), number(worker + item), number(int(run == count))
            mosaic_gpu_merge._finish(shape, shape.dtype, state, [scratch, out, partial, statistics], *places)
            if run < count:
                low, high = (
                    int(schedule.worker_of(jnp.int32(t), jnp.int32(total)))
                    for t in (starts[item], starts[item] + count - 1)
                )
                last = mosaic_gpu_merge._arrive(counters, scratch, number(item), number(high - low + 1))
                if last[0] == 1:
                    emulator.warpgroup_barrier()
                    where = number(item * share), number(low + item), number(high - low + 1)
                    mosaic_gpu_merge._combine(shape, shape.dtype, out, partial, statistics, *where)
            position += run
    assert not counters.memory.bytes.any()  # ready for the next layer
    return out.memory.as_array(FLOATS[shape.dtype], (-1, K)).astype(np.float64)


def random_cache(random, dims, quantized, dtype):
    if not quantized:
        return KVArrays(*((random.normal(size=dims) + 0.3).astype(FLOATS[dtype]) for _ in range(2)))
    units = [random.integers(0, 256, dims, np.uint8) for _ in range(2)]
    return KVArrays(*units, *(
        random.uniform(*limits, dims[:-1]).astype(np.float16) for limits in ((0.002, 0.02), (-2, -0.5)) * 2
    ))  # fmt: skip


CASES = [  # G, share, K, S, quantized, dtype, blocks, bias slots, window, workers
    (2, 1, 128, 320, True, "bfloat16", 1, 1, None, 5),
    (1, 4, 128, 256, True, "bfloat16", 1, 2, 100, 3),
    (1, 7, 128, 200, True, "float16", 1, 1, None, 9),
    (2, 2, 64, 264, True, "bfloat16", 1, 1, None, 4),
    (1, 8, 96, 200, True, "bfloat16", 1, 2, None, 3),
    (1, 5, 32, 136, True, "bfloat16", 1, 1, None, 2),
    (1, 1, 128, 256, True, "bfloat16", 2, 0, None, 1),
    (1, 7, 128, 300, True, "bfloat16", 2, 0, 150, 20),
    (2, 1, 128, 200, False, "bfloat16", 1, 0, None, 3),
    (1, 8, 64, 190, False, "float16", 2, 0, None, 2),
    (1, 3, 96, 130, False, "bfloat16", 1, 0, 64, 4),
    (1, 6, 64, 1300, True, "bfloat16", 1, 0, None, 40),  # more slices an item than are merged at once
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_instruction_by_instruction(case):
    G, share, K, S, quantized, dtype, blocks, bias_slots, window, workers = case
    random = np.random.default_rng(S + K + share)
    L, B, layer = 2, 2, 1
    kv = random_cache(random, (L, B, G, S, K), quantized, dtype)
    lengths = np.array([S, int(random.integers(1, S))], np.int32)
    clean = KVArrays(*(None if array is None else array.copy() for array in vars(kv).values()))
    if quantized:  # what lies past a slot's length may be anything
        for array, poison in ((kv.key_scales, np.nan), (kv.value_scales, np.inf), (kv.value_minimums, np.nan)):
            array[:, 1, :, lengths[1] :] = poison
    query = (random.normal(size=(B, G * share, K)) + 0.1).astype(FLOATS[dtype])
    shape = TileShape(K, share, blocks, quantized, dtype, K**-0.5, "float32" if bias_slots else None)
    bias, options = None, {}
    if bias_slots:
        bias_GK = random.normal(size=(G, K)).astype(np.float32)
        bias_GK[:, [K // 2 - 1, K - 2]] += (150, -90)
        frequencies = 1e4 ** (-np.arange(K // 2) / (K // 2)) * random.uniform(0.8, 1.2, (bias_slots, 1))
        tables = [x.astype(np.float32) for x in reference.rotary_tables(np.arange(S), frequencies, 1.2)]
        bias, options = (bias_GK, *tables), dict(key_bias_GK=bias_GK, key_rotary=tables)
    schedule = Schedule(B, G, S, shape.tokens, workers, window)
    got = run_blocks(shape, schedule, query, kv, layer, lengths, bias).reshape(B, G * share, K)
    want = reference.attend_decode(query, clean, layer, lengths, scale=K**-0.5, sliding_window=window, **options)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < (4e-3 if dtype == "bfloat16" else 1e-3)


@pytest.mark.parametrize("slots, kv_heads, workers, window", [(1, 1, 7, None), (70, 3, 50, 130), (256, 2, 264, None)])
def test_prefix_sum_finds_what_loops_find(slots, kv_heads, workers, window):
    random = np.random.default_rng(slots)
    schedule = Schedule(slots, kv_heads, 640, 64, workers, window)
    lengths = random.integers(0, 641, slots).astype(np.int32)
    for worker in range(0, workers, max(1, workers // 5)):
        got = mosaic_gpu_schedule.locate_values(schedule, point(lengths), emulator.i32(worker))
        want = mosaic_gpu_schedule.locate_portable(schedule, jnp.asarray(lengths), jnp.int32(worker))
        assert [int(x[0]) for x in got][:1] == [int(want[0])]
        if int(want[1]) < slots:  # past the last tile there is nothing to find
            assert [int(x[0]) for x in got] == [int(x) for x in want]


@pytest.mark.parametrize("quantized, K, tokens", [(True, 128, 1), (True, 96, 2), (False, 64, 1)])
def test_append_instruction_by_instruction(quantized, K, tokens):
    random = np.random.default_rng(K)
    L, B, G, S, layer = 2, 3, 2, 16, 1
    kv = random_cache(random, (L, B, G, S, K), quantized, "bfloat16")
    key, value = (random.normal(size=(B, tokens, G, K)).astype(ml_dtypes.bfloat16) for _ in range(2))
    key[0, 0, 0] = 0.75  # a range of zero
    start = np.array([0, 7, 13], np.int32)
    shape = mosaic_gpu_append.AppendShape((L, B, G, S, K), tokens, "bfloat16", quantized)
    cache = {name: point(array) for name, array in vars(kv).items() if array is not None}
    for block in range(-(-shape.rows // 4)):
        pointers = [point(key), point(value), point(start), *cache.values()]
        mosaic_gpu_append._rows(shape, emulator.i32(block), emulator.i32(layer), pointers)
    want = reference.append(kv, layer, key, value, start)
    for name, pointer in cache.items():
        expected = getattr(want, name)
        got = pointer.memory.as_array(expected.dtype, expected.shape)
        np.testing.assert_array_equal(got, expected)
