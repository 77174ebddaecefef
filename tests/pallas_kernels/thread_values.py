"""What the emulators of warps share: instructions of one thread, on arrays over all threads, whatever their number."""

import operator

import ml_dtypes
import numpy as np

HALVES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def word(value):
    """An int as a signed word, by its bits; arrays as they are."""
    return np.uint32(int(value) & 0xFFFFFFFF).view(np.int32) if isinstance(value, int | np.integer) else value


def _integer(operation):
    def apply(a, b):
        with np.errstate(over="ignore"):
            return operation(word(a), word(b)).astype(np.int32)

    return apply


def _float(operation):
    def apply(*values):
        with np.errstate(all="ignore"):
            return np.asarray(operation(*values), np.float32)

    return apply


def iadd(*terms):
    total = np.int32(0)
    with np.errstate(over="ignore"):
        for term in terms:
            total = (total + word(term)).astype(np.int32)
    return total


imul, ixor = _integer(np.multiply), _integer(np.bitwise_xor)
imin, imax = _integer(np.minimum), _integer(np.maximum)
add, sub, mul, divide = (_float(operation) for operation in (np.add, np.subtract, np.multiply, np.divide))
maximum, minimum = _float(np.fmax), _float(np.fmin)
fma = _float(lambda a, b, c: np.float64(a) * b + c)
exp2, log2, reciprocal, sqrt = (_float(operation) for operation in (np.exp2, np.log2, np.reciprocal, np.sqrt))
both, either, select = np.bitwise_and, np.bitwise_or, np.where
float_less, float_equal = np.less, np.equal
as_float, as_word = operator.methodcaller("view", np.float32), operator.methodcaller("view", np.int32)


def less(a, b):
    return word(a) < word(b)


def equal(a, b):
    return word(a) == word(b)


def round_to_float16(x):
    return x.astype(np.float16).astype(np.float32)


def to_byte(x):
    return np.clip(np.rint(x), 0, 255).astype(np.int32)


def permute(a, b, selector):
    b = np.broadcast_to(word(b), a.shape).copy()
    eight = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
    picked = np.stack([eight[:, selector >> 4 * place & 15] for place in range(4)], axis=1)
    return np.ascontiguousarray(picked).view(np.int32)[:, 0]


def pack(low, high, half):
    with np.errstate(all="ignore"):
        return np.stack([low, high], axis=1).astype(HALVES[half]).view(np.int32)[:, 0]


def pairs(word, half):
    """Both halves of words, [threads, 2]."""
    return np.ascontiguousarray(word)[:, None].view(HALVES[half])


def unpack(word, half):
    halves = pairs(word, half).astype(np.float32)
    return halves[:, 0].copy(), halves[:, 1].copy()


def subtract_f16x2(a, b):
    return np.ascontiguousarray(pairs(a, "f16") - pairs(b, "f16")).view(np.int32)[:, 0]
