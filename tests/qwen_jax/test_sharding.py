"""Models on meshes of eight simulated devices against the same model on one: tables, cuts, logits, tokens, HLO."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels.quantized_matmul as quantized
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import layout, layout_mosaic_gpu
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax import QwenForCausalLM
from qwen_jax.checkpoint_store import convert
from qwen_jax.kv_cache import CacheState, KVCache
from qwen_jax.sampling import WHOLE, SamplingConfig, Vocabulary, device_sampler, sample
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharded_weights import ShardedStack
from qwen_jax.sharding import (
    AXES,
    KV_AXES,
    Placement,
    head_layout,
    parameter_axes,
    pieces_along,
    spec,
    split_rows,
    split_vocabulary,
)
from qwen_jax.weight_cuts import common_group_size, take_bias, take_columns, take_rows
from tests.qwen_jax.test_golden import CASES, FOLDER, GOLDEN, decode_logits, golden, load, relative_error

ACT_ORDER = "qwen2-int4-g64-actorder-asym"
QWEN1 = "qwen1-int4-g32"
LIMIT = 1e-5
MESHES = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 6), (1, 8), (2, 4), (8, 1)]


def make_mesh(data: int, model: int, axis_type=AxisType.Explicit, sequence: int = 1) -> Mesh:
    sizes = (data, model, sequence)[: 2 + (sequence > 1)]
    names, devices = ("data", "model", "sequence")[: len(sizes)], jax.devices()[: data * model * sequence]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes), devices=devices)


@functools.lru_cache(maxsize=8)
def on_mesh(case: str, kind: str, data: int, model: int, sequence: int = 1, **options) -> QwenForCausalLM:
    folder, mesh = GOLDEN / case / FOLDER[kind], make_mesh(data, model, sequence=sequence)
    return QwenForCausalLM.from_pretrained(folder, dtype="float32", mesh=mesh, **options)


# -- the whole model ---------------------------------------------------------------------------------------------------

QUICK = [
    (ACT_ORDER, "gptq", 1, 4),  # act-order under row-parallel, groups cut in two, 2 key/value heads on 4 devices
    ("qwen3-gptqmodel-int4-g64-v2-asym-actorder", "gptq", 1, 2),  # 3 key/value heads on 2 devices
    (QWEN1, "gptq", 1, 3, 2),  # dynamic NTK, nothing divides; the cache split along its length as well
    ("qwen3-gptqmodel-int4-g32-dynamic-tied", "float", 4, 2),  # tied head, 2 rows on 4 devices
]
ALL = [(case, kind, *mesh) for case in CASES for kind in FOLDER for mesh in MESHES]


def check_case(case, kind, *mesh, decode=True, long=True):
    one, many, want = load(case, kind), on_mesh(case, kind, *mesh), golden(case)
    ids, tokens = want["ids"], want[f"{kind}_greedy"]
    logits = np.asarray(many(ids))
    assert logits.shape == (*ids.shape, one.config.vocab_size)
    assert relative_error(logits, one(ids)) < LIMIT
    if long:
        assert relative_error(many(want["long_ids"]), one(want["long_ids"])) < LIMIT
    if decode:
        assert relative_error(decode_logits(many, ids, tokens[:, :3]), decode_logits(one, ids, tokens[:, :3])) < LIMIT
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=[], logprobs=True)
    ours, single = many.generate(ids, **settings), one.generate(ids, **settings)
    np.testing.assert_array_equal(ours.tokens, single.tokens)
    np.testing.assert_array_equal(ours.tokens, tokens)
    np.testing.assert_allclose(ours.logprobs, single.logprobs, atol=1e-4)


@pytest.mark.parametrize("case, kind, mesh", [(case, kind, mesh) for case, kind, *mesh in QUICK])
def test_equals_one_device(case, kind, mesh):
    check_case(case, kind, *mesh, decode=case == ACT_ORDER, long=case == QWEN1)


@pytest.mark.slow
@pytest.mark.parametrize("case, kind, data, model", ALL)
def test_equals_one_device_everywhere(case, kind, data, model):
    check_case(case, kind, data, model)


def in_order(array, model, sequence):
    """[L, B, G, S, …] by position, of an array of which device s of "sequence" holds positions s, s + n, …"""
    array = np.asarray(array)
    if sequence == 1 or not isinstance(model._programs, ShardedPrograms):
        return array
    L, B, G, S, *rest = array.shape
    return np.moveaxis(array.reshape(L, B, G, sequence, S // sequence, *rest), 3, 4).reshape(array.shape)


def heads_of(array, table):
    """[L, B, G, …] of one device from an array in the devices' order of heads."""
    order = np.asarray(table).reshape(-1)
    return np.stack([array[:, :, np.flatnonzero(order == head)[0]] for head in range(order.max() + 1)], axis=2)


def onto(many, state, table, sequence):
    """The cache of one device, in NumPy, as a model on a mesh keeps it."""
    programs, (order, n) = many._programs, (np.asarray(table).reshape(-1), sequence)

    def spread(array):
        array = array[:, :, np.maximum(order, 0)]
        length = programs.room(array.shape[3])
        array = np.pad(array, [(0, length - size if axis == 3 else 0) for axis, size in enumerate(array.shape)])
        L, B, G, S, *rest = array.shape
        array = np.moveaxis(array.reshape(L, B, G, S // n, n, *rest), 4, 3).reshape(array.shape)
        array = np.concatenate([array, np.repeat(array[:, -1:], -B % programs.placement.data, axis=1)], axis=1)
        return programs.placement.rows(array, KV_AXES[: array.ndim])

    alpha = None if state.ntk_alpha_B is None else programs._rows(state.ntk_alpha_B)
    return CacheState(jax.tree.map(spread, state.kv), programs._rows(state.lengths_B), alpha)


def check_8_bit_cache(case, kind, data, model, sequence=1, generate=True):
    """From the same bytes a mesh and one device compute the same, within `LIMIT`. Their own bytes may differ: sums in
    another order differ by some 1e-7, and a value that close to the middle between two steps is rounded either way,
    however fine or coarse the steps are. That happens to few, and moves them by a step."""
    options = dict(use_cache_quantization=True, max_length=64)
    one, many = load(case, kind, **options), on_mesh(case, kind, data, model, sequence, **options)
    ids, tokens = golden(case)["ids"], golden(case)[f"{kind}_greedy"]
    B, T = ids.shape
    table = head_layout(one.config.num_heads, one.config.num_kv_heads, model).kv_table

    def rows_alike(theirs, ours, length):
        """Whether each row's bytes are those of one device; those that are not are next to them, and few."""
        same_B = np.ones(B, bool)
        for name in ("keys", "values", "key_scales", "key_minimums", "value_scales", "value_minimums"):
            want, got = np.asarray(getattr(theirs.kv, name)), getattr(ours.kv, name)
            got = heads_of(in_order(got, many, sequence)[:, :B], table)[:, :, :, :length]
            want = want[:, :, :, :length]
            same_B &= (got == want).all(axis=(0, *range(2, want.ndim)))
            if want.dtype == np.uint8:
                assert (got != want).mean() < 1e-3 and np.abs(got.astype(int) - want).max() <= 1
            else:
                np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2**-9, atol=1e-6)
        return same_B

    (want, cache), (got, own) = one.prefill(ids), many.prefill(ids)
    assert relative_error(got, want) < LIMIT  # a prompt attends to what is not rounded yet
    alike_B = rows_alike(cache._peek(), own._peek(), T)
    for step in range(3):
        state = jax.device_get(cache._peek())
        spread = KVCache(onto(many, state, table, sequence), cache.longest, cache.room, B)
        want, cache = one.decode(tokens[:, step : step + 1], cache)
        got, spread = many.decode(tokens[:, step : step + 1], spread)
        same_B = rows_alike(cache._peek(), spread._peek(), T + step + 1)
        for row in range(B):
            assert relative_error(got[row], want[row]) < (LIMIT if same_B[row] else 2.5e-3)
    if generate:
        settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=[])
        np.testing.assert_array_equal(many.generate(ids, **settings), one.generate(ids, **settings))
    return alike_B


def test_8_bit_cache():
    """Qwen 2: key biases are added to the tokens of each share of the length."""
    assert check_8_bit_cache("qwen2-int4-per-channel", "gptq", 1, 2, 2, generate=False).any()


@pytest.mark.slow
@pytest.mark.parametrize("case, kind, data, model", ALL)
def test_8_bit_cache_everywhere(case, kind, data, model):
    check_8_bit_cache(case, kind, data, model)


def test_sampled_tokens_are_those_of_one_device():
    settings = dict(max_new_tokens=9, do_sample=True, eos_token_id=[], seed=[3, 4], repetition_penalty=1.3)
    settings |= dict(top_k=50, top_p=0.9, min_p=0.01, temperature=1.5)
    one, many = load(ACT_ORDER, "gptq"), on_mesh(ACT_ORDER, "gptq", 1, 4)
    ids = golden(ACT_ORDER)["ids"]
    np.testing.assert_array_equal(many.generate(ids, **settings), one.generate(ids, **settings))
    assert not np.array_equal(one.generate(ids, **settings), one.generate(ids, **{**settings, "seed": [5, 6]}))


# -- meshes ------------------------------------------------------------------------------------------------------------


def test_axis_types_and_order_of_axes():
    """`jax.make_mesh` gives Explicit axes, `Mesh(...)` Auto ones; either may come with the axes in the other order."""
    folder, ids = GOLDEN / ACT_ORDER / "quantized", golden(ACT_ORDER)["ids"]
    devices = np.asarray(jax.devices()[:4]).reshape(2, 2)
    meshes = [
        make_mesh(2, 2),
        Mesh(devices.T, ("model", "data")),
        jax.make_mesh((2, 2), ("model", "data"), devices=jax.devices()[:4]),
    ]
    want, _ = load(ACT_ORDER, "gptq").prefill(ids)
    for mesh in meshes:
        model = QwenForCausalLM.from_pretrained(folder, dtype="float32", mesh=mesh)
        logits, _ = model.prefill(ids)
        assert relative_error(logits, want) < LIMIT
    with jax.set_mesh(meshes[-1]):
        np.testing.assert_array_equal(model.prefill(ids)[0], logits)


@pytest.mark.parametrize("mesh, message", [
    (lambda: jax.make_mesh((2, 4), ("x", "model")), r"mesh: axes \('x', 'model'\), expected 'data' and 'model' in"),
    (lambda: jax.make_mesh((8,), ("model",)), r"mesh: axes \('model',\), expected .*jax.make_mesh\(\(1, 8\)"),
    (lambda: make_mesh(1, 8, AxisType.Manual), "mesh: axes of type Manual, expected Explicit or Auto"),
    (lambda: (1, 8), "mesh: tuple, expected a jax.sharding.Mesh"),
])  # fmt: skip
def test_other_meshes_are_named(mesh, message):
    with pytest.raises(ValueError, match=message):
        QwenForCausalLM.from_pretrained(GOLDEN / ACT_ORDER / "quantized", mesh=mesh())


@pytest.mark.parametrize("names, message", [
    (("layers", "height"), "'height' is unknown"),
    (("heads", "mlp"), r"lie on mesh axes \['model', 'model'\]"),
])  # fmt: skip
def test_bad_names_of_dimensions(names, message):
    with pytest.raises(ValueError, match=message):
        spec(names)


# -- where parameters lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, kind, data, model", [QUICK[0], QUICK[3]])
def test_every_parameter_is_named_and_placed_so(case, kind, data, model):
    many, mesh = on_mesh(case, kind, data, model), make_mesh(data, model)
    leaves, names = jax.tree.leaves(many.decoder), parameter_axes(many.decoder)
    assert len(leaves) == len(names)
    split = 0
    for leaf, axes in zip(leaves, names, strict=True):
        assert len(axes) == leaf.ndim
        assert set(axes) <= set(AXES)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec(axes)), leaf.ndim)
        for size, name in zip(leaf.shape, axes, strict=True):
            assert size % pieces_along(name, mesh) == 0
        share = leaf.nbytes // (model if "model" in spec(axes) else 1)
        assert all(shard.data.nbytes == share for shard in leaf.addressable_shards)
        split += leaf.nbytes if "model" in spec(axes) else 0
    # Norms and, of act-order, the order of inputs that all devices share, are the only things with copies.
    assert split > 0.95 * sum(leaf.nbytes for leaf in leaves)


def test_devices_get_their_share_and_nothing_else(monkeypatch):
    """Every byte that is sent to a device while loading is counted: no whole tensor on any of them, not even for a
    moment, and in total about an eighth of the model."""
    sent: dict = {}
    put = jax.device_put

    def counted(array, device):
        sent.setdefault(device, []).append(np.asarray(array).nbytes)
        return put(array, device)

    monkeypatch.setattr(jax, "device_put", counted)
    folder = GOLDEN / QWEN1 / "quantized"
    QwenForCausalLM.from_pretrained(folder, dtype="float32", mesh=make_mesh(1, 8, AxisType.Auto))
    monkeypatch.undo()
    whole = [leaf.nbytes for leaf in jax.tree.leaves(load(QWEN1, "gptq").decoder)]
    assert len(sent) == 8
    for sizes in sent.values():
        assert max(sizes) <= max(whole) / 8
        assert sum(sizes) < 1.5 * sum(whole) / 4  # 4 heads and 12 groups on 8 devices: some of the shares are empty


@pytest.mark.parametrize("case", [ACT_ORDER, QWEN1, "qwen3-gptqmodel-int4-g32-dynamic-tied"])
def test_a_converted_folder_fills_any_mesh(tmp_path, case):
    folder = GOLDEN / case / "quantized"
    convert(folder, tmp_path / "converted")
    for mesh in (make_mesh(1, 3), make_mesh(2, 4)):
        models = [
            QwenForCausalLM.from_pretrained(f, dtype="float32", mesh=mesh) for f in (folder, tmp_path / "converted")
        ]
        leaves, others = (jax.tree.leaves(model.decoder) for model in models)
        for leaf, other in zip(leaves, others, strict=True):
            np.testing.assert_array_equal(leaf, other, strict=True)


@pytest.mark.parametrize("axes", [("hidden", "mlp"), ("mlp", "hidden")])
def test_a_kernels_layout_is_made_of_each_devices_share(monkeypatch, axes):
    rng = np.random.default_rng(0)
    scales = rng.random((2, 40)).astype(np.float16)
    cuts = {
        n: layout.from_integers(rng.integers(0, 16, (256, 40)), scales + n, bits=4, group_size=128) for n in range(4)
    }
    monkeypatch.setattr(quantized, "prepack", lambda weight, kernels, chip=None: layout_mosaic_gpu.prepack(weight))
    placement = Placement(make_mesh(2, 4))
    stack = ShardedStack(placement, 3, axes, "auto")
    stack.put(1, cuts)
    for part in ("packed", "scales"):
        for shard in getattr(stack.value, part).addressable_shards:
            place = np.argwhere(placement.mesh.devices == shard.device)[0][1]
            want = getattr(layout_mosaic_gpu.prepack(cuts[place]), part)
            np.testing.assert_array_equal(np.asarray(shard.data)[1], want)
            assert not np.asarray(shard.data)[[0, 2]].any()


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def compiled_step(many, mesh, quantized: bool):
    """A decode step of two rows, layers unrolled: (compiled HLO, how many of each collective)."""
    many.decoder.unroll = True
    programs = ShardedPrograms(many.decoder, mesh)
    cache = programs.empty_cache(2, 64, "float32", quantized)
    token = programs._rows(np.zeros(2, np.int32))
    hlo = programs._decode.lower(programs._leaves, token, cache=cache, active_length=64).compile().as_text()
    many.decoder.unroll = False
    return hlo, {op: len(re.findall(rf"= \S+ {op}(-start)?\(", hlo)) for op in COLLECTIVES}


@pytest.mark.parametrize("case, gathers", [("qwen2-int4-per-channel", 0), (ACT_ORDER, 1)])
def test_reductions_of_a_decode_step(case, gathers):
    """Two all-reduces a layer and one for the embedding; act-order's stated gather is of activations."""
    many = on_mesh(case, "gptq", 1, 4)
    hlo, count = compiled_step(many, make_mesh(1, 4), quantized=False)
    layers, config = many.config.num_layers, many.config
    assert count == dict.fromkeys(COLLECTIVES, 0) | {"all-reduce": 2 * layers + 1, "all-gather": gathers * layers}
    inner = config.num_heads * config.head_dim
    for shape in re.findall(r"= \S+?\[([\d,]+)\]\S* all-gather", hlo):
        assert np.prod([int(size) for size in shape.split(",")]) == 2 * inner
    copies = re.findall(rf"= \S+?\[{layers},2,\d+,64,{config.head_dim}\]\S* copy\(", hlo)
    assert not copies, "the cache is not updated in place"


# -- tables and cuts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 3), (28, 4), (14, 2), (64, 8), (40, 40), (9, 3)])
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 16])
def test_every_head_has_one_place(heads, kv_heads, devices):
    table = head_layout(heads, kv_heads, devices)
    queries, keys = np.asarray(table.query_table), np.asarray(table.kv_table)
    assert queries.shape == (devices, table.heads) and keys.shape == (devices, table.kv_heads)
    np.testing.assert_array_equal(np.sort(queries[queries >= 0]), np.arange(heads))
    served = np.repeat(keys, table.queries, axis=1)  # the key/value head beside each query head, as kernels pair them
    np.testing.assert_array_equal(served[queries >= 0], queries[queries >= 0] // (heads // kv_heads))
    assert table.heads < -(-heads // devices) + heads // kv_heads


def test_heads_of_qwen25_7b_on_8_devices():
    table = head_layout(28, 4, 8)
    assert (table.kv_heads, table.queries) == (1, 4)
    assert table.kv_table == ((0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,))
    assert table.query_table[:2] == ((0, 1, 2, 3), (4, 5, 6, -1))


@pytest.mark.parametrize("size, group_size, devices, length, group", [
    (13696, 128, 8, 1792, 128),  # 107 groups on 8 devices
    (29568, 128, 8, 3712, 128),
    (320, 64, 4, 96, 32),  # 5 groups: halves
    (11008, 11008, 8, 1376, 1376),  # one group a column stays one
    (13696, None, 8, 1728, None),
])  # fmt: skip
def test_rows_are_split_at_groups(size, group_size, devices, length, group):
    rows = split_rows(size, group_size, devices)
    assert rows.shape == (devices, length)
    np.testing.assert_array_equal(rows[rows >= 0], np.arange(size))
    if group is not None:
        assert common_group_size(rows, group_size) == group


def test_vocabulary_is_split_whole():
    for size, devices in ((151936, 8), (151936, 3), (384, 8), (352, 8), (50, 1)):
        ids = split_vocabulary(size, devices)
        np.testing.assert_array_equal(ids[ids >= 0], np.arange(size))


def columns_or_zero(matrix, index, axis):
    result = np.take(matrix, np.maximum(index, 0), axis=axis)
    np.moveaxis(result, axis, 0)[index < 0] = 0
    return result


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 24), (8, 16), (3, 96), (2, 32)])
@pytest.mark.parametrize("rows", [
    [*range(32, 64), *range(64)],  # whole words
    [*range(10, 42), *[-1] * 5, *range(90, 96), 3],  # anything
    [*[-1] * 32, *range(64, 96)],  # an empty head
    [*range(64, 96), *[-1] * 32],
])  # fmt: skip
def test_cuts_are_exact(zeros, bits, group_size, rows):
    rng = np.random.default_rng(bits)
    q, groups = rng.integers(0, 2**bits, (96, 20)), 96 // group_size
    zero = rng.integers(0, 2**bits, (groups, 20)) if zeros else None
    weight = layout.from_integers(
        q, rng.normal(size=(groups, 20)).astype(np.float16), zero, bits=bits, group_size=group_size
    )
    dense, rows = dequantize(weight), np.asarray(rows)
    cut = take_rows(weight, rows, common_group_size(rows[None], group_size))
    assert cut.scales.shape[0] == cut.groups
    np.testing.assert_array_equal(dequantize(cut), columns_or_zero(dense, rows, 0))
    columns = np.array([3, 4, -1, 19, 0])
    np.testing.assert_array_equal(dequantize(take_columns(weight, columns)), columns_or_zero(dense, columns, 1))
    table = DenseTensor(rng.normal(size=(20, 96)), "float64", 96)
    np.testing.assert_array_equal(take_rows(table, rows).data.T, columns_or_zero(table.data.T, rows, 0))
    np.testing.assert_array_equal(take_columns(table, columns).data.T, columns_or_zero(table.data.T, columns, 1))
    np.testing.assert_array_equal(take_bias(np.arange(20), columns), [3, 4, 0, 19, 0])


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(),
    dict(repetition_penalty=1.5),
    dict(do_sample=True),
    dict(do_sample=True, top_k=7),
    dict(do_sample=True, top_p=0.8, temperature=0.5),
    dict(do_sample=True, min_p=0.1, top_k=1000),
], ids=str)  # fmt: skip
def test_sampling_from_a_split_vocabulary(settings):
    """60 ids on 8 devices, eight each: the last has four, the rest of it is no id."""
    rng, B, V = np.random.default_rng(1), 64, 60
    vocabulary = Vocabulary("model", V, 8)
    logits = rng.normal(size=(B, V)).astype(np.float32)
    logits[:, 40] = logits[:, 12]  # ties go to the lowest id
    logits[0, [12, 40]] = 9
    seen = rng.random((B, V)) < 0.2
    step = np.arange(B, dtype=np.int32)
    numbers, filters = device_sampler(SamplingConfig(**settings), np.arange(B) % 5)
    want, _ = sample(logits, seen, step, numbers, filters, WHOLE)
    lowest = np.full((B, 64 - V), np.finfo(np.float32).min, np.float32)
    padded = np.concatenate([logits, lowest], axis=1), np.pad(seen, ((0, 0), (0, 64 - V)))

    def local(logits, seen, step):
        token, _ = sample(logits, seen, step, numbers, filters, vocabulary)
        return token, vocabulary.at(logits, token), vocabulary.mark(seen, token)

    split = jax.shard_map(
        local,
        mesh=make_mesh(1, 8, AxisType.Auto),
        in_specs=(P(None, "model"), P(None, "model"), P()),
        out_specs=(P(), P(), P(None, "model")),
        check_vma=False,
    )
    token, logit, marked = jax.jit(split)(*padded, step)
    np.testing.assert_array_equal(token, want)
    np.testing.assert_array_equal(logit, logits[step, want])
    seen[step, want] = True
    np.testing.assert_array_equal(np.asarray(marked)[:, :V], seen)
    assert len(np.unique(want)) > 10
