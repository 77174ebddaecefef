"""Decode attention and append for Hopper: structure under the GPU interpreter, lowering for CUDA, and on a card itself.

The interpreter cannot run inline instructions, so there the arithmetic is the portable twin; what is tested is the
division of the work, the ring of copies with race detection, segments, slices and the scatter. The fast arithmetic is
lowered here and run by the tests marked gpu.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import mosaic_gpu, mosaic_gpu_append, mosaic_gpu_decode, reference
from pallas_kernels.kv_attention.mosaic_gpu_fragments import TileShape
from pallas_kernels.kv_attention.mosaic_gpu_schedule import Schedule
from pallas_kernels.kv_attention.op import AttentionShape
from pallas_kernels.kv_attention.tensor import KVArrays
from tests.pallas_kernels import kv_attention_portable as portable


def random_cache(random, dims, dtype):
    """A cache of random numbers with a mean; tokens nobody attends to are poisoned where that can show."""
    if dtype != "uint8":
        return KVArrays(*(jnp.asarray(random.normal(size=dims) + 0.3, dtype) for _ in range(2)))
    bytes_ = [random.integers(0, 256, dims, np.uint8) for _ in range(2)]
    scales = [random.uniform(*limits, dims[:-1]) for limits in ((0.002, 0.02), (-2, -0.5)) * 2]
    return KVArrays(*map(jnp.asarray, bytes_), *(jnp.asarray(x, jnp.float16) for x in scales))


def random_rotary(random, slots, length, head_dim, factor=1.0):
    frequencies = 1e4 ** (-np.arange(head_dim // 2) / (head_dim // 2)) * random.uniform(0.8, 1.2, (slots, 1))
    return tuple(jnp.asarray(x, jnp.float32) for x in reference.rotary_tables(np.arange(length), frequencies, factor))


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def relative_error(got, want):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# -- the division of the work ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_tile_has_one_worker_and_every_slice_one_place(seed):
    random = np.random.default_rng(seed)
    slots, kv_heads, workers = int(random.integers(1, 9)), int(random.integers(1, 5)), int(random.integers(1, 70))
    schedule = Schedule(slots, kv_heads, 1024, 64, workers, None if seed % 2 else 200)
    lengths = jnp.asarray(random.integers(1, 1025, slots), jnp.int32)
    counts, firsts = schedule.tiles_of(lengths, jnp.arange(slots))
    visible = lengths if schedule.window is None else jnp.minimum(lengths, schedule.window)
    assert (firsts * 64 <= lengths - visible).all() and ((firsts + counts) * 64 >= lengths).all()
    per_item = np.repeat(np.asarray(counts), kv_heads)
    total = jnp.int32(per_item.sum())
    bounds = np.asarray(schedule.first_of(jnp.arange(workers + 1), total))
    assert bounds[0] == 0 and bounds[-1] == total
    sizes = np.diff(bounds)
    active = min(workers, int(total))
    assert (sizes[:active] >= 1).all() and sizes.max() - sizes[:active].min() <= 1 and not sizes[active:].any()
    owner = np.asarray(schedule.worker_of(jnp.arange(int(total)), total))
    np.testing.assert_array_equal(owner, np.repeat(np.arange(workers), sizes))
    item = np.repeat(np.arange(slots * kv_heads), per_item)
    segments = set(zip(owner, item, strict=True))
    assert len({int(w + i) for w, i in segments}) == len(segments)


# -- under the interpreter -------------------------------------------------------------------------------


def merged(out, partial, statistics, schedule, lengths, share, dims):
    """The slices the kernel left, merged as its last block would: [B, H, K]."""
    out, partial, statistics = (np.asarray(x, np.float64) for x in (out, partial, statistics))
    counts = np.repeat(np.asarray(schedule.tiles_of(lengths, jnp.arange(schedule.slots))[0]), schedule.kv_heads)
    starts, total = np.concatenate([[0], np.cumsum(counts)]), jnp.int32(counts.sum())
    for item, count in enumerate(counts):
        low, high = (int(schedule.worker_of(int(tile), total)) for tile in (starts[item], starts[item] + count - 1))
        if low == high:
            continue
        places = np.arange(low, high + 1) + item
        top = statistics[places, :, 0].max(0)
        ratio = np.exp(statistics[places, :, 0] - top)
        value = (partial[places] * ratio[..., None]).sum(0) / (statistics[places, :, 1] * ratio).sum(0)[:, None]
        out[item * share : (item + 1) * share] = value
    return out.reshape(dims)


@pytest.mark.parametrize(
    "cache, share, workers, window, bias_slots",
    [("uint8", 2, 4, None, 2), ("uint8", 1, 5, 100, 1), ("bfloat16", 3, 3, 70, 0)],
)
def test_structure_under_the_interpreter(cache, share, workers, window, bias_slots):
    random = np.random.default_rng(workers)
    L, B, G, S, K = 2, 2, 2, 256, 32
    H = G * share
    kv = random_cache(random, (L, B, G, S, K), cache)
    lengths = jnp.asarray([201, 65], jnp.int32)
    query = jnp.asarray(random.normal(size=(B, H, K)), jnp.bfloat16)
    shape = TileShape(K, share, 1, cache == "uint8", "bfloat16", 0.2, "float32" if bias_slots else None)
    bias, reference_bias, layers = (), {}, [jnp.ones(1, jnp.int32)]
    if bias_slots:
        bias_GK = jnp.asarray(random.normal(size=(G, K)) * 10, jnp.float32)
        rotary = random_rotary(random, bias_slots, S, K, factor=1.3)
        reference_bias = dict(key_bias_GK=bias_GK, key_rotary=rotary)
        stacked = bias_slots == 2
        bias = (jnp.stack([bias_GK * 3, bias_GK]) if stacked else bias_GK, *rotary)
        layers += [jnp.ones(1, jnp.int32)] * stacked
    kernel = mosaic_gpu_decode.build(
        shape,
        mosaic_gpu_decode.Plan(1, 2, workers),
        (B, G, S),
        window,
        bias_slots,
        arithmetic=portable.PortableMerge(shape),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        whole=False,
    )
    scales = tuple(getattr(kv, name) for name in mosaic_gpu_decode.SCALES) if cache == "uint8" else ()
    out = kernel(
        query.reshape(B, G, share, K), kv.keys, kv.values, scales, lengths, layers,
        jnp.zeros(B * G, jnp.int32), bias,
    )  # fmt: skip
    assert not races_found()
    got = merged(*out, Schedule(B, G, S, 64, workers, window), lengths, share, (B, H, K))
    want = reference.attend_decode(query, kv, 1, lengths, scale=0.2, sliding_window=window, **reference_bias)
    assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("cache, tokens", [("uint8", 1), ("uint8", 2), ("bfloat16", 1)])
def test_append_under_the_interpreter(cache, tokens):
    random = np.random.default_rng(tokens)
    L, B, G, S, K = 2, 3, 2, 16, 32
    kv = random_cache(random, (L, B, G, S, K), cache)
    key, value = (jnp.asarray(random.normal(size=(B, tokens, G, K)), jnp.bfloat16) for _ in range(2))
    start = jnp.asarray([0, 7, S - 1], jnp.int32)
    shape = mosaic_gpu_append.AppendShape(kv.keys.shape, tokens, "bfloat16", kv.quantized)
    got = mosaic_gpu_append.append(
        kv, 1, key, value, start, arithmetic=portable.PortableAppend(shape),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    assert not races_found()
    check_appended(kv, got, 1, key, value, start)


def check_appended(before, got, layer, key, value, start):
    """Against the reference, one token at a time, those past the end dropped."""
    want, S = before, before.keys.shape[3]
    for token in range(key.shape[1]):
        fits = np.asarray(start) + token < S
        at = np.where(fits, np.asarray(start) + token, 0)
        key_value = (np.asarray(array)[:, token : token + 1] for array in (key, value))
        new = reference.append(want, layer, *key_value, at)
        keep = [None if a is None else np.where(fits.reshape(1, -1, *[1] * (a.ndim - 2)), a, np.asarray(b))
                for a, b in zip(vars(new).values(), vars(want).values(), strict=True)]  # fmt: skip
        want = KVArrays(*keep)
    for name, a in vars(got).items():
        if a is None:
            continue
        a, b = np.asarray(a), np.asarray(getattr(want, name))
        if a.dtype == np.uint8:  # a rounding of float32 may fall the other way
            assert (a != b).mean() < 2e-3 and np.abs(a.astype(int) - b).max() <= 1
        else:
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=2e-3 if a.itemsize == 2 else 0)


# -- lowering --------------------------------------------------------------------------------------------


def abstract(L, B, G, S, K, cache, array=jax.ShapeDtypeStruct):
    scales = [array((L, B, G, S), jnp.float16)] * 4 if cache == "uint8" else []
    return KVArrays(*[array((L, B, G, S, K), jnp.dtype(cache))] * 2, *scales)


@pytest.mark.parametrize(
    "cache, share, head_dim, bias, window",
    [("uint8", 1, 128, "shared", None), ("uint8", 7, 128, "slots", 300), ("uint8", 4, 96, None, None),
     ("bfloat16", 8, 64, None, 64), ("float16", 1, 128, None, None)],
)  # fmt: skip
def test_attention_lowers_for_cuda(cache, share, head_dim, bias, window):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")  # arrays that know of a mesh lower by other ways
    array = functools.partial(jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P()) if window else None)
    dtype = "float16" if cache == "float16" else "bfloat16"
    B, G, S = 4, 2, 1024
    tables = (array((B if bias == "slots" else 1, S, head_dim // 2), jnp.float32),) * 2
    lowered = (
        jax.jit(
            lambda q, kv, layer, n, b, r: mosaic_gpu_decode.attend_decode(
                q, kv, layer, n, scale=0.1, key_bias_GK=b, key_rotary=r, sliding_window=window
            )
        )
        .trace(
            array((B, G * share, head_dim), jnp.dtype(dtype)),
            abstract(3, B, G, S, head_dim, cache, array),
            array((), jnp.int32),
            array((B,), jnp.int32),
            array((G, head_dim), jnp.bfloat16) if bias else None,
            tables if bias else None,
        )
        .lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("cache", ["uint8", "bfloat16"])
def test_append_lowers_for_cuda_in_place(cache):
    array = jax.ShapeDtypeStruct
    B, T, G, S, K = 4, 1, 2, 64, 128
    new = array((B, T, G, K), jnp.bfloat16)
    lowered = (
        jax.jit(mosaic_gpu_append.append, donate_argnums=0)
        .trace(abstract(3, B, G, S, K, cache), array((), jnp.int32), new, new, array((B,), jnp.int32))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    arrays = 6 if cache == "uint8" else 2
    assert lowered.count("tf.aliasing_output") == arrays  # donated arguments become results …
    assert lowered.count("output_operand_alias<") == arrays  # … and the kernel writes its operands in place


# -- the choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, word",
    [
        ({}, None),
        ({"dtype": "float32"}, "float32"),
        ({"heads": 18}, "18"),
        ({"head_dim": 80}, "80"),
        ({"length": 9}, "9"),
    ],
)
def test_unsupported_says_why(change, word):
    facts = dict(slots=4, heads=8, kv_heads=2, head_dim=128, length=2048, quantized=True, dtype="bfloat16") | change
    reason = mosaic_gpu.unsupported(AttentionShape(**facts), "NVIDIA H100 80GB HBM3")
    assert (reason is None) if word is None else word in reason
    assert "TPU v5e" in mosaic_gpu.unsupported(AttentionShape(**facts), "TPU v5e")


def test_plans_fit_shared_memory():
    for share in range(1, 9):
        for head_dim in (32, 64, 96, 128):
            for quantized, biased in ((True, True), (True, False), (False, False)):
                plan = mosaic_gpu_decode.plan_for(8, 4, 4096, share, head_dim, quantized, biased)
                shape = TileShape(
                    head_dim, share, plan.blocks, quantized, "bfloat16", 1.0, "float32" if biased else None
                )
                assert mosaic_gpu_decode.shared_bytes(shape, plan.stages) <= mosaic_gpu_decode.SHARED_BYTES - 1024
                assert plan.blocks == 1 or not biased


def test_plan_has_as_many_blocks_as_whole_items_where_it_can():
    assert mosaic_gpu_decode.plan_for(8, 32, 2048, 1, 128, True, False).workers == 256
    assert mosaic_gpu_decode.plan_for(1, 1, 64, 1, 128, True, False).workers == 1


# -- on a card -------------------------------------------------------------------------------------------

GPU_CASES = [  # B, H, G, S, K, cache, dtype, bias, window
    (1, 1, 1, 64, 32, "uint8", "bfloat16", None, None),
    (2, 4, 4, 256, 128, "uint8", "bfloat16", "shared", None),
    (3, 28, 4, 712, 128, "uint8", "float16", "slots", None),
    (5, 40, 5, 2048, 128, "uint8", "bfloat16", None, 333),
    (2, 6, 2, 512, 64, "uint8", "bfloat16", "shared", 100),
    (4, 8, 2, 264, 96, "uint8", "bfloat16", "slots", None),
    (65, 4, 2, 128, 128, "uint8", "bfloat16", None, None),
    (1, 32, 32, 4096, 128, "uint8", "bfloat16", "shared", None),
    (3, 28, 4, 520, 128, "bfloat16", "bfloat16", None, None),
    (2, 8, 1, 2048, 64, "bfloat16", "bfloat16", None, 700),
    (2, 6, 2, 304, 96, "float16", "float16", None, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_attention_on_the_card(case):
    B, H, G, S, K, cache, dtype, bias, window = case
    random = np.random.default_rng(B * S + K)
    kv = random_cache(random, (2, B, G, S, K), cache)
    lengths = random.integers(1, S + 1, B)
    lengths[0] = S
    query = jnp.asarray(random.normal(size=(B, H, K)) + 0.1, dtype)
    options = dict(scale=K**-0.5, sliding_window=window)
    if bias:
        bias_GK = random.normal(size=(G, K))
        bias_GK[:, [K // 2 - 1, K - 2]] += (150, -90)
        options["key_bias_GK"] = jnp.asarray(bias_GK, jnp.float32)
        options["key_rotary"] = random_rotary(random, B if bias == "slots" else 1, S, K, factor=1.2)
    given = dict(options)
    if bias == "slots":
        given |= dict(key_bias_GK=jnp.stack([options["key_bias_GK"] * 3, options["key_bias_GK"]]), key_bias_layer=1)
    attend = jax.jit(lambda q, kv, layer, n: mosaic_gpu_decode.attend_decode(q, kv, layer, n, **given))
    poison = jnp.full((B * H * K + 2**20,), jnp.nan, jnp.float32)
    poison.block_until_ready()
    del poison  # its memory is what the outputs are likely made of
    results = [np.asarray(attend(query, kv, jnp.int32(1), jnp.asarray(lengths, jnp.int32))) for _ in range(3)]
    assert all(np.array_equal(results[0], other) for other in results[1:])  # the same bits whatever the timing
    want = reference.attend_decode(query, jax.tree.map(np.asarray, kv), 1, lengths, **options)
    assert relative_error(results[0], want) < (4e-3 if dtype == "bfloat16" else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cache, tokens, K", [("uint8", 1, 128), ("uint8", 3, 96), ("bfloat16", 2, 64)])
def test_append_on_the_card(cache, tokens, K):
    random = np.random.default_rng(K)
    L, B, G, S = 2, 5, 3, 64
    kv = random_cache(random, (L, B, G, S, K), cache)
    before = jax.tree.map(np.array, kv)
    key, value = (jnp.asarray(random.normal(size=(B, tokens, G, K)), jnp.bfloat16) for _ in range(2))
    start = jnp.asarray([0, 7, 30, 62, 63], jnp.int32)

    def run(kv, key, value, start):
        return mosaic_gpu_append.append(kv, 1, key, value, start)

    compiled = jax.jit(run, donate_argnums=0).lower(kv, key, value, start).compile()
    assert " copy(" not in compiled.as_text()  # nothing of the cache is copied
    check_appended(before, compiled(kv, key, value, start), 1, key, value, start)
