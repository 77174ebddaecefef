"""The persistent decode kernel over several cards: all blocks on one emulator, pushes landing late and shuffled."""

import copy

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step import cards, group, kernel, op
from pallas_kernels.kv_attention.tensor import KVArrays
from pallas_kernels.quantized_matmul import layout_mosaic_gpu
from qwen_jax.weight_cuts import take_columns, take_rows
from tests.pallas_kernels import block_emulator as emulator
from tests.pallas_kernels import test_decode_step as one_card

K = one_card.K


@pytest.fixture
def on_the_emulator(monkeypatch):
    for module in (*one_card.MODULES, cards):
        monkeypatch.setattr(module, "w", emulator)
        if hasattr(module, "d"):
            monkeypatch.setattr(module, "d", emulator)


def share(case, card, count):
    """What one of `count` cards holds of a case."""
    mine = copy.copy(case)
    mine.heads, mine.kv_heads, mine.inner = case.heads // count, case.kv_heads // count, case.inner // count
    heads, groups, inner = (
        np.arange(card * size, (card + 1) * size) for size in (mine.heads * K, mine.kv_heads * K, mine.inner)
    )
    values = case.heads * K + case.kv_heads * K
    joint = np.concatenate([heads, groups + case.heads * K, groups + values])
    mine.tensors = {
        "qkv": cut(case.tensors["qkv"], columns=joint),
        "output": cut(case.tensors["output"], rows=heads),
        "gate_up": cut(case.tensors["gate_up"], columns=np.concatenate([inner, inner + case.inner])),
        "down": cut(case.tensors["down"], rows=inner),
    }
    for name, columns in (("qkv_bias", joint), ("key_bias", groups)) if case.bias else ():
        mine.vectors = mine.vectors | {name: case.vectors[name][:, columns]}
    some = slice(card * mine.kv_heads, (card + 1) * mine.kv_heads)
    mine.kv = jax.tree.map(lambda array: np.ascontiguousarray(array[:, :, some]), case.kv)
    return mine


def cut(tensor, rows=None, columns=None):
    """Some rows or columns of each layer."""
    whole, parts = layout_mosaic_gpu.unpack(jax.tree.map(jnp.asarray, tensor)), []
    for layer in range(tensor.stack[0]):
        matrix = jax.tree.map(lambda array, layer=layer: np.asarray(array[layer]), whole)
        parts.append(take_columns(matrix, columns) if rows is None else take_rows(matrix, rows, tensor.group_size))
    return layout_mosaic_gpu.prepack(jax.tree.map(lambda *leaves: np.stack(leaves), *parts))


def emulate(case, count, blocks, seed, **options):
    """(hidden of each card, the cache put together) of the kernel's code on `count` cards."""
    shares = [share(case, card, count) for card in range(count)]
    plans = [mine.plan(blocks, cards=count, **options) for mine in shares]
    assert len(set(plans)) == 1
    [plan] = set(plans)
    shape = group.inbox_shape(plan)
    inboxes = [emulator.Memory(np.zeros(shape, np.int32)) for _ in range(count)]
    every, memories = [], []
    for card, mine in enumerate(shares):
        inputs = op.operands(mine.x, mine.weights(), mine.start(), mine.tables())
        here = {name: emulator.Memory(np.asarray(array)) for name, array in inputs.items()}
        for name, result in kernel.result_shapes(plan).items():
            here[name] = emulator.Memory(np.full(result.shape, np.nan, result.dtype))
        cached = {name: getattr(mine.kv, name) for name in kernel.CACHE if getattr(mine.kv, name) is not None}
        here |= {name: emulator.Memory(array) for name, array in cached.items()} | {"inbox": inboxes[card]}
        pointers = {name: emulator.Pointer(memory) for name, memory in here.items()}
        pointers |= {"rank": emulator.i32(card), "inbox_of": lambda other: emulator.Pointer(inboxes[other])}
        every.append(pointers)
        memories.append(here)

    def body(block, shared):
        card, block = divmod(block, plan.blocks)
        kernel.emit(plan, every[card], shared, emulator.i32(block))

    _, size = plan.regions()
    grid = emulator.Grid(count * plan.blocks, plan.warps + 4, size, body, seed)
    grid.run()
    assert not grid.copies, "a card left before all that was pushed to it had landed"
    assert not any(here["counters"].bytes.any() for here in memories)
    hidden = [here["hidden"].as_array(ml_dtypes.bfloat16, case.x.shape) for here in memories]
    whole = {}
    for name in kernel.CACHE:
        arrays = [getattr(mine.kv, name) for mine in shares]
        if arrays[0] is not None:
            parts = [h[name].as_array(a.dtype, a.shape) for h, a in zip(memories, arrays, strict=True)]
            whole[name] = np.concatenate(parts, axis=2)
    return hidden, KVArrays(**whole)


@pytest.mark.parametrize(
    "case, count, blocks, seed, direct",
    [
        (dict(inner=512, batch=2, lengths=(39, 64)), 2, 3, 0, False),
        (dict(inner=512, batch=5, lengths=(39, 64, 1, 20, 33), layers=1), 2, 2, 1, True),
        # Column strips do not divide evenly: two blocks share some. The newest push lands first.
        (dict(inner=512, hidden=384, lengths=(39,), layers=1, quantized=False, bias=False), 2, 5, 1, False),
        pytest.param(
            dict(inner=384, heads=3, kv_heads=3, batch=3, lengths=(1, 20, 33), qk_norm=True, layers=1), 3, 2, 2, False,
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_equals_float64_of_the_whole(on_the_emulator, case, count, blocks, seed, direct):
    case = one_card.Case(**case)
    hidden, kv = emulate(case, count, blocks, seed, splits=1, direct=direct)
    want, wanted_kv = case.reference()
    for other in hidden[1:]:
        assert np.array_equal(hidden[0].view(np.uint16), other.view(np.uint16)), "the cards differ"
    error = np.linalg.norm(hidden[0].astype(np.float64) - want) / np.linalg.norm(want)
    assert error < 1.5e-2, error
    got, wish = (np.asarray(x.keys).astype(np.float64) for x in (kv, wanted_kv))
    assert np.abs(got - wish).max() < 0.08 * (255 if case.quantized else np.abs(wish).max())
