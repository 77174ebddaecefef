"""What the consuming warps do with a matrix: a tile's products, and the sums of all warps.

Operand A of mma.m16n8k16 is made from packed words (`quantized_matmul.layout_mosaic_gpu`), operand B are the rows of
x; rows past the last repeat it and are never stored. Σ (q − zero)·x = Σ encoded·x − (offset + zero)·Σx, where 4-bit
fields are encoded as 128 + q and 8-bit ones as q − 128, both exact in bfloat16.
"""

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.plan import CHUNK, STRIP, Matrix, Plan
from pallas_kernels.kv_attention import warp as w

ONES = 0x3F803F80


def encoded(words, bits: int):
    """Operand A of one step: four words of two numbers, from one word (4 bits) or two (8 bits)."""
    registers = []
    for index in range(4):
        if bits == 4:
            registers.append(d.masked_or(d.shift_right(words[0], 4 * index), 0x000F000F, 0x43004300))
            continue
        word = d.shift_right(words[index // 2], 8 * (index % 2))
        # 255 does not fit into 7 bits: q − 128 = (128 + low 7 bits) − (256, or 128 where the top bit is set).
        low = d.masked_or(word, 0x007F007F, 0x43004300)
        registers.append(d.subtract_bf16x2(low, d.masked_xor(word, 0x00800080, 0x43804380)))
    return registers


def x_operand(plan: Plan, x, lane, chunk):
    """Operand B of a chunk: two words for each of its eight steps."""
    row = w.imin(w.irem(lane, 8), plan.batch - 1)
    where = w.iadd(w.imul(row, plan.x_stride), w.imul(w.idiv(lane, 8), 16), w.imul(chunk, 2 * CHUNK))
    pointer = w.offset(x, where)
    loads = [d.load_matrices(pointer, 64 * quarter) for quarter in range(4)]
    return [pair for load in loads for pair in (load[:2], load[2:])]


def place_of(plan: Plan, row, column):
    """Where `direct_words` finds an element of x: in pieces of 32 columns, in them by row, lane t, matrix, element."""
    line = w.iadd(w.imul(w.idiv(column, 32), plan.batch), row)
    t, inside = w.idiv(w.irem(column, 8), 2), w.irem(column, 32)
    return w.iadd(w.imul(line, 32), w.imul(t, 8), w.imul(w.idiv(inside, 8), 2), w.irem(column, 2))


def direct_words(plan: Plan, matrix: Matrix, source, lane, depth, exists):
    """A tile's operand B from global memory, 16 words a chunk; zeros for rows, chunks and tiles that are not there."""
    if plan.batch < 8:
        exists = w.both(exists, w.less(lane, 4 * plan.batch))
    found = []
    for row in range(matrix.rows):
        chunk, here = w.iadd(w.imul(depth, matrix.rows), row), exists
        if matrix.chunks % matrix.rows != 0 and row > 0:
            here = w.both(exists, w.less(chunk, matrix.chunks))
        pointer = w.element(source, w.iadd(w.imul(chunk, 4 * 4 * plan.batch), lane), 16)
        for quarter in range(4):
            found += d.load_fresh_if(here, pointer, quarter * 64 * plan.batch)
    return found


def tile(plan: Plan, matrix: Matrix, operand_of, slot, extra, lane, depth, sums):
    """`sums` (four floats a strip) plus the products of a tile: chunks depth · rows …, all strips of the part.

    `operand_of(row, chunk)` gives two words of operand B for each step of the tile's row-th chunk.
    """
    bits, groups, width = matrix.bits, matrix.groups, matrix.width
    steps = 8 // groups
    offset = 128.0 if bits == 4 else -128.0
    g = w.idiv(lane, 4)
    packed = w.offset(slot, w.imul(lane, 16))
    sums = list(sums)
    for row in range(matrix.rows):
        chunk = w.iadd(w.imul(depth, matrix.rows), row)
        partial = matrix.chunks % matrix.rows != 0 and row > 0
        exists = w.less(chunk, matrix.chunks) if partial else None
        operand = operand_of(row, w.imin(chunk, matrix.chunks - 1) if partial else chunk)
        x_sums = []
        for group in range(groups):
            total = [w.f32(0.0)] * 4
            for step in range(group * steps, (group + 1) * steps):
                total = w.mma(total, [w.i32(ONES)] * 4, operand[step], "bf16")
            x_sums.append(total)
        for strip in range(width):
            at = (row * width + strip) * matrix.unit_bytes
            flat = [word for part in range(bits // 2) for word in w.load_words(packed, at + 512 * part, 4)]
            words = [flat[step * bits // 4 : (step + 1) * bits // 4] for step in range(8)]
            for group in range(groups):
                place = row * matrix.extra_bytes + group * matrix.scale_bytes + strip * STRIP * 2
                minus = [w.f32(-(offset + 2 ** (bits - 1)))] * 2
                if not matrix.symmetric:
                    zero = row * matrix.extra_bytes + groups * matrix.scale_bytes + group * matrix.zero_bytes
                    zero += strip * STRIP
                    minus = [
                        w.sub(w.f32(-offset), d.float_of_byte(extra, w.iadd(g, zero + 8 * high))) for high in range(2)
                    ]
                total = [w.f32(0.0)] * 4
                for step in range(group * steps, (group + 1) * steps):
                    total = w.mma(total, encoded(words[step], bits), operand[step], "bf16")
                # Added last, so that no product waits for the sums of x.
                total = [w.fma(x, minus[i // 2], y) for i, (x, y) in enumerate(zip(x_sums[group], total, strict=True))]
                for high in range(2):
                    where = w.iadd(w.imul(g, 2), place + 16 * high)
                    scale = w.load_float_of(extra, where, matrix.scale_dtype)
                    if exists is not None:
                        scale = w.select(exists, scale, w.f32(0.0))
                    for column in range(2):
                        index = 4 * strip + 2 * high + column
                        sums[index] = w.fma(total[2 * high + column], scale, sums[index])
    return sums


def store_sums(plan: Plan, matrix: Matrix, region, warp, lane, sums):
    """A warp's sums into shared memory, [warp][strip][column][row of x]."""
    rows, row = plan.batch, w.imul(w.irem(lane, 4), 2)
    base = w.imul(w.iadd(w.imul(warp, matrix.width * STRIP), w.idiv(lane, 4)), rows)
    for column in range(2):
        here = w.iadd(row, column)

        def write(column=column, here=here):
            for strip in range(matrix.width):
                for high in range(2):
                    where = w.iadd(base, here, (strip * STRIP + 8 * high) * rows)
                    w.store_floats(region, w.imul(where, 4), [sums[4 * strip + 2 * high + column]])

        w.when(w.less(here, rows), write)


def results(plan: Plan, thread):
    """(row, column, whether it exists) of the results that a thread of `blocks` finishes, for each round."""

    def of(matrix: Matrix):
        threads, total = 32 * plan.warps, plan.batch * matrix.block_columns
        found = []
        for round_ in range(-(-total // threads)):
            index = w.iadd(thread, round_ * threads)
            exists = w.less(index, total)
            index = w.imin(index, total - 1)
            found.append((w.idiv(index, matrix.block_columns), w.irem(index, matrix.block_columns), exists))
        return found

    return of


def gathered(plan: Plan, matrix: Matrix, region, row, column, half: int):
    """The sum of all warps' parts of one result, in the order of the warps."""
    size, together = matrix.width * STRIP, plan.warps // matrix.parts
    part = w.iadd(w.idiv(column, size), half * matrix.parts // matrix.halves)
    inside = w.iadd(w.imul(w.irem(column, size), plan.batch), row)
    base = w.iadd(w.imul(part, size * plan.batch), inside)
    total = None
    for place in range(together):
        where = w.imul(w.iadd(base, place * matrix.parts * size * plan.batch), 4)
        value = w.load_floats(region, where)[0]
        total = value if total is None else w.add(total, value)
    return total
