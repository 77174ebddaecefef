"""Static facts of a decode step: how each matrix and the cache are divided among blocks and warps, and shared memory.

A *tile* is what one warp consumes at a time, one slot of the ring: of a matrix `rows` chunks of 128 rows by `width`
strips of 16 columns (`quantized_matmul.layout_mosaic_gpu`), of an 8-bit cache 16 tokens of one head.
"""

import dataclasses
import math

CHUNK, STRIP, TOKENS = 128, 16, 16
SLOT_BYTES = 4096
LOADERS = 4  # warps: one alone spends longer on a tile's addresses than memory on its bytes
SHARED_BYTES = 226 * 1024  # 1 KB of a block's 227 goes to what Mosaic itself reserves


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One projection of all layers.

    Attributes:
        name: "qkv", "output", "gate_up" or "down".
        in_features: rows.
        out_features: columns; of gate_up both halves together.
        halves: 2 for gate_up, whose halves' columns meet in one block, else 1.
        bits: 4 or 8.
        group_size: rows that share a scale.
        scale_dtype: "bfloat16" or "float16".
        columns: columns of the stored scales.
        symmetric: without zero-points.
        parts: column parts of a block's share; warp w works on part w % parts.
        width: strips a part.
        rows: chunks a tile.
    """

    name: str
    in_features: int
    out_features: int
    halves: int
    bits: int
    group_size: int
    scale_dtype: str
    columns: int
    symmetric: bool
    parts: int
    width: int
    rows: int

    @property
    def chunks(self) -> int:
        return self.in_features // CHUNK

    @property
    def groups(self) -> int:
        """Groups of a chunk."""
        return max(1, CHUNK // self.group_size)

    @property
    def scale_rows(self) -> int:
        """Rows of the stored scales."""
        return -(-self.in_features // self.group_size)

    @property
    def half_strips(self) -> int:
        return -(-self.out_features // self.halves // STRIP)

    @property
    def stored_strips(self) -> int:
        return self.columns // STRIP

    @property
    def block_strips(self) -> int:
        """Strips of a block in each half."""
        return self.parts // self.halves * self.width

    @property
    def block_columns(self) -> int:
        """Results of a block a row of x."""
        return self.block_strips * STRIP

    @property
    def depth(self) -> int:
        """Tiles along the rows."""
        return -(-self.chunks // self.rows)

    @property
    def unit_bytes(self) -> int:
        """A chunk of a strip."""
        return 256 * self.bits

    @property
    def scale_bytes(self) -> int:
        """Scales of a tile's chunk in one group."""
        return self.width * STRIP * 2

    @property
    def zero_bytes(self) -> int:
        return 0 if self.symmetric else self.width * STRIP

    @property
    def extra_bytes(self) -> int:
        """Scales and zero-points of one chunk of a tile."""
        return self.groups * (self.scale_bytes + self.zero_bytes)

    @property
    def tile_bytes(self) -> int:
        return self.rows * (self.width * self.unit_bytes + self.extra_bytes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call.

    Attributes:
        layers: L of the weights.
        batch: B, rows of x.
        hidden: D.
        heads: H.
        kv_heads: G.
        inner: F.
        head_dim: K, 128.
        cache_layers: layers of the cache.
        length: S of the cache.
        quantized: 8-bit cache.
        first_layer: the cache's layer of the weights' layer 0.
        epsilon: of all norms.
        scale: factor on the logits.
        window: sliding window or None.
        norm_dtype: of the norms' scales.
        bias_dtype: of the qkv bias, or None.
        key_bias_dtype: of the keys' bias, or None.
        qk_norm: whether queries and keys are normed.
        logn: whether queries have a factor.
        table_rows: leading size of the rotary tables: 1, or one table a row.
        matrices: qkv, output, gate_up, down.
        blocks: of the grid, all resident.
        warps: that consume, a multiple of 4.
        slots: of all warps' rings.
        splits: parts of each (row, key/value head) of the cache.
        skip: names of phases whose work is left out, to time the others (results are then meaningless); "cards" for
            the sums over cards.
        cards: that hold shares of the layers; heads, F and matrices are those of one card.
        direct: the form for rows of x that do not all fit beside a ring: see `unstaged`; and parts of attention are
            merged after a block's last, not each on its own.
    """

    layers: int
    batch: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    head_dim: int
    cache_layers: int
    length: int
    quantized: bool
    first_layer: int
    epsilon: float
    scale: float
    window: int | None
    norm_dtype: str
    bias_dtype: str | None
    key_bias_dtype: str | None
    qk_norm: bool
    logn: bool
    table_rows: int
    matrices: tuple[Matrix, ...]
    blocks: int
    warps: int
    slots: int
    splits: int
    skip: tuple[str, ...] = ()
    cards: int = 1
    direct: bool = False

    @property
    def share(self) -> int:
        return self.heads // self.kv_heads

    @property
    def items(self) -> int:
        return self.batch * self.kv_heads

    @property
    def item_rounds(self) -> int:
        """Parts of the cache that a block takes one after another."""
        return -(-self.items * self.splits // self.blocks)

    @property
    def cache_slots(self) -> int:
        """Ring slots of 16 tokens: keys and values together, or one each."""
        return 1 if self.quantized else 2

    @property
    def biased(self) -> bool:
        """Whether attention adds the keys' bias."""
        return self.quantized and self.key_bias_dtype is not None

    @property
    def unstaged(self) -> tuple[str, ...]:
        """Matrices whose x warps read from global memory, where the phase before left it as `matmul.place_of` says."""
        if not self.direct:
            return ()
        return ("output", "down") if self.splits == 1 else ("down",)

    @property
    def staged_width(self) -> int:
        """The widest x in shared memory."""
        return max(matrix.in_features for matrix in self.matrices if matrix.name not in self.unstaged)

    @property
    def x_stride(self) -> int:
        """Bytes between rows of x in shared memory."""
        return self.staged_width * 2 + 16

    @property
    def extra_stride(self) -> int:
        """Bytes of a slot beside its 4096."""
        most = max(matrix.rows * matrix.extra_bytes for matrix in self.matrices)
        return -(-max(most, 4 * 2 * TOKENS * self.quantized) // 128) * 128

    @property
    def merge_queries(self) -> int:
        """Query heads whose parts are merged at once."""
        return max(1, min(self.share, 16384 // (self.warps * self.head_dim * 4)))

    @property
    def parts_of_bias(self) -> int:
        return 1 if self.share <= 4 else 2

    @property
    def query_bytes(self) -> int:
        """A part's queries in shared memory."""
        return self.share * self.head_dim * 2

    @property
    def fresh_bytes(self) -> int:
        """A part's newest key and value in shared memory."""
        return 2 * (self.head_dim * 2 + 16)

    @property
    def kept_bytes(self) -> int:
        """A warp's state of a part in shared memory: outputs, then maximum and sum of eight queries."""
        return self.share * self.head_dim * 4 + 64

    @property
    def scratch_bytes(self) -> int:
        """Where the warps' products of the keys' bias pass, at the beginning of x."""
        return self.warps * 2 * self.share * 256 if self.biased else 0

    def regions(self) -> tuple[dict[str, int], int]:
        """Byte offset of each region of shared memory, and their total size."""
        sums = max(self.warps * matrix.width * STRIP * self.batch * 4 for matrix in self.matrices)
        merge = self.warps * (self.merge_queries * self.head_dim * 4 + 64)
        parts = self.item_rounds if self.direct else 1  # that are there at once
        kept = parts * self.warps * self.kept_bytes if self.direct else 0
        sizes = {
            "ring": self.slots * SLOT_BYTES,
            "extra": self.slots * self.extra_stride,
            "full": self.slots * 8,
            "empty": self.slots * 8,
            "x": max(self.batch * self.x_stride, self.scratch_bytes + kept),
            "sums": max(sums, merge),
            "small": 4 * self.warps * 8,
            "zero": 4,
            "query": parts * self.query_bytes,
            "fresh": parts * self.fresh_bytes,
            "table": 8192 if self.biased else 0,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // 128) * 128
        return offsets, at

    def matrix(self, name: str) -> Matrix:
        return next(matrix for matrix in self.matrices if matrix.name == name)


def divide(name: str, half_out: int, halves: int, bits: int, warps: int, blocks: int, chunks: int, most: int = 4):
    """(parts, width, rows) of a matrix's tiles: as few parts as let a chunk of a part fit a slot."""
    units = min(most, SLOT_BYTES // (256 * bits))
    strips = math.ceil(math.ceil(half_out / STRIP) / blocks)
    parts = next((p for p in (1, 2, 4, 8) if -(-strips // p) <= units and warps % (p * halves) == 0), None)
    if parts is None:
        raise ValueError(f"{name}: {strips} strips a block do not divide among {warps} warps.")
    width = -(-strips // parts)
    depth = warps // (parts * halves)  # warps along the rows: no fewer tiles than these
    rows = max(1, min(units // width, -(-chunks // depth)))
    return parts * halves, width, rows


def splits_for(items: int, blocks: int, tokens: int, share: int) -> int:
    """Parts of each item of the cache: the least time of the slowest block, merging counted (in blocks of tokens)."""
    most = max(1, min(math.ceil(tokens / 64), 64))

    def cost(splits):
        rounds = -(-items * splits // blocks)
        return rounds * (tokens / splits + 64) + splits * items * share * 0.5

    return min(range(1, most + 1), key=cost)
