"""What a thread of a decode-attention kernel holds, and where: static shapes, register bags, fragments of cache rows.

Tokens (for logits) or channels (for the output) lie on mma's 16 rows, the queries that share a head on its 8 columns.
A thread (g, t) of a warp reads whole 16-byte pieces of a row where it can; the order of a contraction is free, so that
the bytes are in mma's order once the queries are laid out to match.
"""

import dataclasses

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.kv_attention import warp as w

WARPGROUP = 128


@dataclasses.dataclass(frozen=True)
class TileShape:
    """Static facts of a kernel's arithmetic.

    Attributes:
        head_dim: K, a multiple of 32.
        share: query heads a key/value head, 1 to 8.
        blocks: R, 16-token blocks a warp; 1 with a key bias.
        quantized: 8-bit cache.
        dtype: of the queries, and of a 16-bit cache: "bfloat16" or "float16".
        scale: factor on the logits.
        bias_dtype: dtype of the key bias; None without one.
    """

    head_dim: int
    share: int
    blocks: int
    quantized: bool
    dtype: str
    scale: float
    bias_dtype: str | None = None

    def __post_init__(self):
        if self.bias_dtype is not None and self.blocks != 1:
            raise ValueError(f"blocks: found {self.blocks} with a key bias, expected 1: a warp's table has 16 rows.")

    @property
    def tokens(self) -> int:
        """Tokens a tile."""
        return 64 * self.blocks

    @property
    def state(self) -> int:
        """Floats of running state a thread: outputs, then maximum, sum and offset, two columns each."""
        return self.head_dim // 4 + 6

    @property
    def setup(self) -> int:
        """Words a thread keeps of a segment's queries: fragments, two sums."""
        return self.head_dim // 8 + 2

    @property
    def scratch(self) -> int:
        """Floats of shared memory for merging warps and for the bias product."""
        merging = 4 * 3 * 8 + 4 * self.share * self.head_dim
        parts = 1 if self.share <= 4 else 2
        turned = parts * (self.head_dim // 32) * 32 * 4  # chunks of 16 pairs, 32 lanes, 4 words
        return max(merging, turned if self.bias_dtype else 0)

    @property
    def table(self) -> int:
        """Words a thread holds of the bias product's table."""
        return self.head_dim // 2 if self.bias_dtype else 0

    @property
    def itemsize(self) -> int:
        """Bytes an element of the cache."""
        return 1 if self.quantized else 2


def swizzled(shape: TileShape) -> bool:
    """Whether rows are whole 128-byte segments, kept in shared memory with TMA's 128-byte swizzle."""
    return shape.head_dim * shape.itemsize % 128 == 0


def cache_transforms(shape: TileShape):
    """Transforms of the shared-memory buffers of keys and values."""
    if not swizzled(shape):
        return ()
    return plgpu.TilingTransform((8, 128 // shape.itemsize)), plgpu.SwizzleTransform(128)


def bag(words: int, dtype):
    """A shape and layout under which each thread holds `words` registers of its own."""
    return plgpu.ShapeDtypeStruct((WARPGROUP * words,), dtype, layout=bag_layout(words))


def bag_layout(words: int):
    """The layout of `bag`."""
    return plgpu.Layout.WG_STRIDED((WARPGROUP * words,), 1)


def unbag(array):
    """The registers of a bag, as values."""
    return [w.llvm.extractelement(register, w.i32(0)) for register in array.registers.flat]


def rebag(values, kind):
    """Values of one kind (an MLIR type) as a bag."""
    vector = w.llvm.mlir_undef(ir.VectorType.get((1,), kind))
    registers = np.empty((len(values),), dtype=object)
    for index, value in enumerate(values):
        registers[index] = w.llvm.insertelement(vector, value, position=w.i32(0))
    layout = mgpu.WGStridedFragLayout((WARPGROUP * len(values),), 1)
    signed = False if kind == w.i32_type() else None
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def scalar(array):
    """The value of a scalar argument."""
    return array.registers.item()


@dataclasses.dataclass(frozen=True)
class Thread:
    """Where a thread stands: its warp, and its row g and column t of mma's fragments."""

    index: ir.Value
    warp: ir.Value
    g: ir.Value
    t: ir.Value
    lane: ir.Value

    @classmethod
    def here(cls):
        """The running thread."""
        index = w.thread_index()
        lane = w.irem(index, 32)
        return cls(index, w.idiv(index, 32), w.idiv(lane, 4), w.irem(lane, 4), lane)


def piece(size: int) -> int:
    """The widest access, in bytes, that divides `size`: 16, 8 or 4."""
    return next(width for width in (16, 8, 4) if size % width == 0)


def key_pieces(shape: TileShape, thread: Thread):
    """The pieces of a key's row a thread reads: (byte offset in an unswizzled row, words, extra byte offset value).

    Together the four threads t of a row read it once; a thread's elements in this order are four a mma step.
    """
    size = shape.head_dim * shape.itemsize
    if swizzled(shape):
        return [
            (segment * 128, 4, w.imul(w.iadd(w.imul(thread.t, 2), odd), 16))
            for segment in range(size // 128)
            for odd in range(2)
        ]
    width = piece(size // 4)
    return [(at, width // 4, w.imul(thread.t, size // 4)) for at in range(0, size // 4, width)]


def value_pieces(shape: TileShape, thread: Thread):
    """Likewise the pieces of a value's row that the threads of row g read."""
    size = shape.head_dim * shape.itemsize
    if swizzled(shape):
        return [(segment * 128, 4, w.imul(thread.g, 16)) for segment in range(size // 128)]
    width = piece(size // 8)
    return [(at, width // 4, w.imul(thread.g, size // 8)) for at in range(0, size // 8, width)]


def channel_of_output(shape: TileShape, position: int, thread: Thread):
    """The channel of a thread's output row `position`: the order in which `value_pieces` reads."""
    elements = 16 // shape.itemsize
    if swizzled(shape):
        return w.iadd(w.imul(thread.g, elements), position // elements * 8 * elements + position % elements)
    return w.iadd(w.imul(thread.g, shape.head_dim // 8), position)


def read_row(shape: TileShape, base, row_low, row_high: int, pieces):
    """Words of a row: `row_low` (0–7, a value) + `row_high` (a multiple of 8, as value or int) picks the row."""
    size = shape.head_dim * shape.itemsize
    words = []
    for at, count, extra in pieces:
        if swizzled(shape):  # eight rows of a 128-byte segment are one kilobyte, pieces permuted by the row
            high = w.imul(row_high, size)
            within = w.ixor(extra, w.imul(row_low, 16))
            where = w.iadd(high, w.imul(row_low, 128), within, at * 8)
        else:
            where = w.iadd(w.imul(w.iadd(row_low, row_high), size), extra, at)
        words += w.load_words(base, where, count)
    return words


def raised_bytes(word, selector: int):
    """Two bytes of a word, picked by the selector, as float16 1024 + u."""
    return w.permute(word, w.i32(0x64646464), selector)


def bytes_to_halves(word, selector: int):
    """Two bytes of a word, picked by the selector, as float16 u − 128."""
    return w.subtract_f16x2(raised_bytes(word, selector), w.i32(0x64806480))


def split_halves(first, second):
    """Two floats as two words of float16 pairs whose sum has 22 bits: (high, low)."""
    high = w.pack(first, second, "f16")
    back = w.unpack(high, "f16")
    return high, w.pack(w.sub(first, back[0]), w.sub(second, back[1]), "f16")
