"""Packing against Python's own integers: a column is one number, its rows digits of base 2^bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.reference import dequantize

BITS = st.sampled_from(layout.BITS)


def integers(seed, shape, bits):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)


def column_number(q_I, bits):
    return sum(int(q) << (row * bits) for row, q in enumerate(q_I))


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(1, 100), st.integers(1, 5), st.integers(0, 2**31))
def test_a_column_is_one_stream_of_bits(bits, in_features, out_features, seed):
    q_IO = integers(seed, (in_features, out_features), bits)
    packed = layout.pack(q_IO, bits)
    assert packed.dtype == np.int32 and packed.flags.c_contiguous
    assert packed.shape == (layout.words(in_features, bits), out_features)
    for column in range(out_features):
        number = int.from_bytes(packed[:, column].astype("<i4").tobytes(), "little")
        assert number == column_number(q_IO[:, column], bits)
    np.testing.assert_array_equal(layout.unpack(packed, bits, in_features), q_IO)


@settings(max_examples=20, deadline=None)
@given(BITS, st.integers(1, 70), st.integers(0, 2**31))
def test_stacks_and_views(bits, in_features, seed):
    q_LIO = integers(seed, (3, 4, in_features), bits).transpose(0, 2, 1)
    packed = layout.pack(q_LIO, bits)
    np.testing.assert_array_equal(packed[1], layout.pack(q_LIO[1], bits))
    np.testing.assert_array_equal(layout.unpack(packed[::2], bits, in_features), q_LIO[::2])


def test_nibble_i_of_word_w_is_row_8w_plus_i():
    packed = layout.pack(np.arange(16, dtype=np.uint8)[:, None], 4)
    assert [hex(word) for word in packed[:, 0].view(np.uint32)] == ["0x76543210", "0xfedcba98"]


@settings(max_examples=60, deadline=None)
@given(
    BITS, st.integers(2, 90), st.sampled_from([-1, 1, 16, 32, 64]), st.booleans(), st.booleans(), st.integers(0, 2**31)
)
def test_dequantize(bits, in_features, group_size, has_zeros, act_order, seed):
    random = np.random.default_rng(seed)
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    q_IO, zeros = integers(seed, (in_features, 3), bits), integers(seed + 1, (groups, 3), bits) if has_zeros else None
    scales = random.uniform(0.5, 2, (groups, 3)).astype(np.float16)
    permutation = random.permutation(in_features) if act_order else None
    weight = layout.from_integers(q_IO, scales, zeros, permutation, bits=bits, group_size=group_size)
    want = np.zeros((in_features, 3))
    for row in range(in_features):
        group = row // size
        zero = 2 ** (bits - 1) if zeros is None else zeros[group].astype(float)
        place = row if permutation is None else permutation[row]
        want[place] = scales[group].astype(float) * (q_IO[row].astype(float) - zero)
    np.testing.assert_array_equal(dequantize(weight), want)
    assert weight.groups == groups and weight.out_features == 3 and weight.stack == ()


def test_dequantize_a_stack():
    q_LIO, scales = integers(0, (2, 40, 8), 4), np.ones((2, 2, 8), np.float32)
    weight = layout.from_integers(q_LIO, scales, bits=4, group_size=32)
    np.testing.assert_array_equal(dequantize(weight), q_LIO - 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 16}, r"scales: shape \(1, 4\), expected \(2, 4\)"),
        ({"zeros": np.zeros((2, 4))}, r"zeros: shape"),
        ({"zeros": np.full((1, 4), 16)}, "zeros lie between 16 and 16, expected 0 to 15"),
        ({"permutation": np.zeros(32, int)}, "each of 32 inputs once"),
        ({"q_IO": np.full((32, 4), 16)}, "integers from 16 to 16, expected 0 to 15"),
        ({"q_IO": np.full((32, 4), -1)}, "integers from -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_from_integers_refuses(changes, message):
    arguments = {"q_IO": integers(0, (32, 4), 4), "scales": np.ones((1, 4)), "bits": 4} | changes
    with pytest.raises(ValueError, match=message):
        layout.from_integers(**arguments)


def test_unpack_refuses_a_wrong_number_of_words():
    with pytest.raises(ValueError, match="packed has 3 rows of words, expected 4"):
        layout.unpack(np.zeros((3, 2), np.int32), 4, 32)
