"""Sums over cards, one launch each: all cards on one emulator, at different paces, pushes landing late and shuffled."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import card_sums
from pallas_kernels.card_sums import exchange, kernel
from tests.pallas_kernels import block_emulator as emulator

H200 = "NVIDIA H200"
EPSILON = 1e-5
LAYERS = 3


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    monkeypatch.setattr(kernel, "w", emulator)
    monkeypatch.setattr(kernel, "d", emulator)
    monkeypatch.setattr(emulator, "addresses", {})


class Cards:
    """The memory of some cards, as `exchange.addresses` tells it."""

    def __init__(self, count: int, width: int):
        self.count, self.width, self.random = count, width, np.random.default_rng(count)
        exchange._memory.cache_clear()
        self.table = exchange.addresses(tuple(jax.devices()[:count]), width)
        for inbox, numbers in exchange._memory(tuple(jax.devices()[:count]), width):
            for array in (inbox, numbers):
                emulator.addresses[array.unsafe_buffer_pointer()] = emulator.Memory(array)

    def numbers(self):
        """The cards' copies of the next reduction's number."""
        return [emulator.addresses[int(row.view(np.int64)[1])].bytes.view(np.int32) for row in self.table]

    def launches(self, plans, seed: int):
        """[{name: array, "shares": …}] of one launch after another on each card; a card's next begins once all blocks
        of the one before are over."""
        made, first = [], 0
        for number, plan in enumerate(plans):
            shape = plan.rows, self.width
            draw = lambda: self.random.normal(0.5, 1, shape).astype(ml_dtypes.bfloat16)  # noqa: E731, B023
            hidden, shares = draw(), [draw() for _ in range(self.count)]
            scale = self.random.normal(1, 0.2, (LAYERS, self.width)).astype(np.float32)
            layer = np.array([number % LAYERS], np.int32)
            cards = []
            for card, share in enumerate(shares):
                arrays = dict(share=share, hidden=hidden, addresses=self.table[card], scale=scale, layer=layer)
                empty = np.full(shape, np.nan, ml_dtypes.bfloat16)
                arrays = {name: arrays[name] for name in plan.inputs} | dict.fromkeys(plan.results, empty)
                cards.append({name: emulator.Memory(array) for name, array in arrays.items()})
            made.append(dict(plan=plan, hidden=hidden, shares=shares, scale=scale[layer[0]], cards=cards, first=first))
            first += plan.blocks * self.count
        most = max(plan.threads for plan in plans) // 32

        def body(block, shared):
            number = max(n for n, launch in enumerate(made) if launch["first"] <= block)
            launch, me = made[number], emulator._here.warp
            plan = launch["plan"]
            if me.index >= plan.threads // 32:
                return
            card, block = divmod(block - launch["first"], plan.blocks)
            if number:
                before = made[number - 1]["plan"].blocks
                start = made[number - 1]["first"] + card * before
                earlier = [warp for warp in me.grid.warps if start <= warp.block < start + before]
                me.wait(lambda: all(warp.done for warp in earlier), "the launch before")
            pointers = {name: emulator.Pointer(memory) for name, memory in launch["cards"][card].items()}
            kernel.emit(plan, pointers, shared, emulator.i32(block))

        grid = emulator.Grid(first, most, kernel.SHARED_BYTES, body, seed)
        grid.run()
        assert not grid.copies, "a card left before all that was pushed to it had landed"
        return made


def wanted(hidden, shares, scale=None):
    """As `lax.psum` and XLA's additions: the sum in float32 in the cards' order, rounded twice; then the norm."""
    total = shares[0].astype(np.float32)
    for share in shares[1:]:
        total = total + share.astype(np.float32)
    total = (hidden.astype(np.float32) + total.astype(ml_dtypes.bfloat16).astype(np.float32)).astype(ml_dtypes.bfloat16)
    if scale is None:
        return total, None
    x = total.astype(np.float64)
    return total, x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


@pytest.mark.parametrize(
    "cards, width, rows, seed",
    [
        (2, 256, (1, 2), 0),
        (2, 1032, (1, 1), 1),  # the newest push lands first; the last block of a row has one piece
        (3, 512, (2, 1), 2),
        (3, 256, (1, 3), 3),
    ],
)
def test_bits_of_a_plain_sum(cards, width, rows, seed):
    here = Cards(cards, width)
    norms = (None, EPSILON, EPSILON, None, None, EPSILON)
    plans = [kernel.Plan(rows[n % 2], width, cards, norm) for n, norm in enumerate(norms)]
    for launch in here.launches(plans, seed):
        names, shape = launch["plan"].results, launch["hidden"].shape
        want, normed = wanted(launch["hidden"], launch["shares"], launch["scale"] if len(names) > 1 else None)
        for memories in launch["cards"]:
            found = {name: memories[name].as_array(ml_dtypes.bfloat16, shape) for name in names}
            np.testing.assert_array_equal(found["sum"].view(np.uint16), want.view(np.uint16))
            if normed is not None:
                np.testing.assert_allclose(found["normed"].astype(np.float64), normed, rtol=2**-8)
            first = launch["cards"][0][names[-1]].bytes
            assert np.array_equal(first, memories[names[-1]].bytes), "the cards differ"
    assert all((numbers == 1 + len(plans)).all() for numbers in here.numbers())


@pytest.mark.parametrize("rows, width", [(1, 8192), (32, 8192), (64, 8192), (64, 5120), (3, 3584), (64, 8), (64, 7176)])
@pytest.mark.parametrize("norm", [None, EPSILON])
def test_all_columns_and_no_more_blocks_than_run_at_once(rows, width, norm):
    plan = kernel.Plan(rows, width, 2, norm)
    assert plan.threads <= 1024 and plan.blocks <= exchange.NUMBERS
    assert plan.parts * plan.threads >= plan.pieces > (plan.parts - 1) * plan.threads
    assert norm is None or plan.parts == 1, "a norm needs its row in one block"


def lowered(rows, width, cards=2):
    def both(share, hidden, scale, addresses):
        hidden, normed = card_sums.add_sum_norm(share, hidden, scale, 1, addresses, epsilon=EPSILON, chip=H200)
        return card_sums.add_sum(normed, hidden, addresses, chip=H200)

    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((LAYERS, width), jnp.float32)
    addresses = jax.ShapeDtypeStruct((1, 2 * (cards + 2)), jnp.int32)
    return jax.jit(both).trace(x, x, scale, addresses).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows, width, cards", [(1, 8192, 2), (32, 8192, 2), (64, 3584, 8)])
def test_lowers_for_cuda_as_plain_launches(monkeypatch, rows, width, cards):
    monkeypatch.undo()  # the kernel's own instructions
    text = lowered(rows, width, cards)
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 2
    assert "uses_xla_collective_metadata = true" not in text


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(chip="NVIDIA A100-SXM4-80GB"), "it is written for NVIDIA H100"),
        (dict(dtype="float16"), "it adds bfloat16, not float16"),
        (dict(rows=65), "1 to 64 rows, not 65"),
        (dict(width=100), "multiple of 8 columns up to 8192, not 100"),
        (dict(width=16384), "not 16384"),
        (dict(cards=1), "2 to 8 cards, not 1"),
    ],
)
def test_unsupported_says_why(change, reason):
    usual = dict(rows=32, width=8192, cards=2, dtype="bfloat16", chip=H200)
    assert card_sums.unsupported(**usual) is None
    assert reason in card_sums.unsupported(**usual | change)


def test_an_unsupported_sum_is_an_error():
    with pytest.raises(ValueError, match="card_sums on NVIDIA H200: it takes 1 to 64 rows, not 65"):
        lowered(65, 256)
