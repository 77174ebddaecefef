"""Decode attention over the cache on TPUs in Pallas Mosaic TPU: each slot's valid blocks are read once, as bytes.

- Grid: slots, then blocks of tokens. A block holds the tokens of all key/value heads; past a slot's length (or before
  its window) the block index stands still, so that nothing more is loaded, and nothing is computed.
- Keys enter the matrix unit as their integers, values as u − 128, both exact in bfloat16; scales and minimums act on
  logits and probabilities in float32. Softmax is rescaled from block to block.
- Keys' bias: coefficients of cos and sin over the tokens of the first block, turned by the angle of a block's start, so
  that tables of one block serve all. As three bfloat16 parts each, they multiply as exactly as float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.kv_attention import mosaic_tpu_append, mosaic_tpu_prompt
from pallas_kernels.kv_attention.share import hide_empty, turned_back
from pallas_kernels.kv_attention.tensor import KVArrays

MASKED = -1e30
BLOCK_BYTES = 512 << 10  # of keys
LONGEST_BLOCK = 1024
LONGEST_BIASED_BLOCK = 512  # whose tables are loaded, too
LANES = 128
PARTS = 3
HEADS_A_TURN = 4  # independent work for the scheduler


def unsupported(shape, chip: str) -> str | None:
    """None, or why this kernel cannot run `shape` on `chip`."""
    if reason := tpu.refusal(chip):
        return reason
    if shape.dtype != "bfloat16":
        return f"it computes with bfloat16 queries, not {shape.dtype}"
    if shape.head_dim % 16 or shape.head_dim > 256:
        return f"head_dim must be a multiple of 16 up to 256, got {shape.head_dim}"
    if shape.window:
        return "a share's sliding window differs from slot to slot, and its windows are of one size"
    return None


def form(shape, chip: str) -> str:
    """How `attend_decode` computes `shape` on `chip`."""
    del chip
    itemsize = 1 if shape.quantized else 2
    return f"blocks of {block_length(shape.kv_heads, shape.head_dim, shape.length, itemsize)} tokens, all heads"


def append(kv: KVArrays, layer, key_BTGK, value_BTGK, start_B, share: bool = False) -> KVArrays:
    """Writes T tokens of one layer; see `op.append`."""
    del share  # a single token that starts below 0 is never written
    module = mosaic_tpu_append if key_BTGK.shape[1] == 1 else mosaic_tpu_prompt
    return module.append(kv, layer, key_BTGK, value_BTGK, start_B)


def block_length(kv_heads: int, head_dim: int, length: int, itemsize: int) -> int:
    """Tokens of a block: a multiple of 128, about `BLOCK_BYTES` of keys."""
    tokens = LANES
    lanes = -(-head_dim // LANES) * LANES
    while tokens * 2 * kv_heads * lanes * itemsize <= BLOCK_BYTES and tokens < min(LONGEST_BLOCK, length):
        tokens *= 2
    return tokens


def attend_decode(
    query_BHK,
    kv: KVArrays,
    layer,
    lengths_B,
    *,
    scale,
    key_bias_GK,
    key_rotary,
    sliding_window,
    active_length,
    share: bool = False,
):
    """One new token a slot over the cache; see `op.attend_decode`."""
    B, H, K = query_BHK.shape
    G, S = kv.keys.shape[2:4]
    queries = H // G
    rows = 1 if queries == 1 else -(-queries // 8) * 8
    biased = kv.quantized and key_bias_GK is not None
    tokens = block_length(G, K, S, kv.keys.dtype.itemsize)
    tokens = min(tokens, LONGEST_BIASED_BLOCK) if biased else tokens
    longest = min(active_length or S, S)
    blocks = -(-longest // tokens)
    if sliding_window is not None:
        blocks = min(blocks, -(-sliding_window // tokens) + 1)

    def padded(array_BHK):
        array = array_BHK.reshape(B, G, queries, K)
        return jnp.pad(array, ((0, 0), (0, 0), (0, rows - queries), (0, 0)))

    def token_block(slot, block, scalars):
        length = jnp.clip(scalars[1 + slot], 1, S)
        first = 0 if sliding_window is None else lax.div(jnp.maximum(length - sliding_window, 0), jnp.int32(tokens))
        return jnp.minimum(first + block, lax.div(length - 1, jnp.int32(tokens)))

    def cache_index(slot, block, scalars):
        return scalars[0], slot, 0, token_block(slot, block, scalars), 0

    def scale_index(slot, block, scalars):
        return scalars[0], slot, 0, token_block(slot, block, scalars)

    in_specs = [pl.BlockSpec((None, G, rows, K), lambda slot, block, scalars: (slot, 0, 0, 0))]
    in_specs += [pl.BlockSpec((None, None, G, tokens, K), cache_index)] * 2
    operands = [padded(query_BHK), kv.keys, kv.values]
    scratch = [pltpu.VMEM((G, rows, LANES), jnp.float32)] * 2 + [pltpu.VMEM((G, rows, K), jnp.float32)]
    if kv.quantized:
        in_specs += [pl.BlockSpec((None, None, G, tokens), scale_index)] * 4
        operands += [kv.key_scales, kv.key_minimums, kv.value_scales, kv.value_minimums]
        scratch.append(pltpu.VMEM((4, G, tokens), jnp.float32))
    if biased:
        coefficients, base, table = _bias_operands(query_BHK, key_bias_GK, key_rotary, padded, tokens, S, share)
        of_slot = (lambda slot: slot) if table.shape[0] > 1 else (lambda slot: 0)
        in_specs += [
            pl.BlockSpec((None, G * rows, K), lambda slot, block, scalars: (slot, 0, 0)),
            pl.BlockSpec(
                (None, None, 2, K),
                lambda slot, block, scalars: (of_slot(slot), token_block(slot, block, scalars), 0, 0),
            ),
            pl.BlockSpec((None, PARTS, tokens, K), lambda slot, block, scalars: (of_slot(slot), 0, 0, 0)),
        ]
        operands += [coefficients, base, table]
        scratch.append(pltpu.VMEM((G * rows, tokens), jnp.float32))
    scalars = jnp.concatenate([jnp.asarray(layer, jnp.int32)[None], lengths_B.astype(jnp.int32)])
    cache_bytes = B * G * longest * (2 * K * kv.keys.dtype.itemsize + (8 if kv.quantized else 0))
    out_spec = pl.BlockSpec((None, G, rows, K), lambda slot, block, scalars: (slot, 0, 0, 0))
    log_spec = pl.BlockSpec((None, G, rows, LANES), lambda slot, block, scalars: (slot, 0, 0, 0))
    out_shape = jax.ShapeDtypeStruct((B, G, rows, K), jnp.float32 if share else query_BHK.dtype)
    facts = dict(quantized=kv.quantized, biased=biased, share=share)
    attended = pl.pallas_call(
        functools.partial(_body, scale=scale, length=S, window=sliding_window, **facts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, blocks),
            in_specs=in_specs,
            out_specs=[out_spec, log_spec] if share else out_spec,
            scratch_shapes=scratch,
        ),
        out_shape=[out_shape, jax.ShapeDtypeStruct((B, G, rows, LANES), jnp.float32)] if share else out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 << 20),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * H * longest * K, bytes_accessed=cache_bytes, transcendentals=B * H * longest
        ),
        name="attend_decode" + ("_8bit" if kv.quantized else ""),
    )(scalars, *operands)
    if not share:
        return attended[:, :, :queries].reshape(B, H, K)
    attended, log_total = attended
    attended_BHK, log_total_BH = attended[:, :, :queries].reshape(B, H, K), log_total[:, :, :queries, 0].reshape(B, H)
    return hide_empty(attended_BHK, log_total_BH, lengths_B)


def _bias_operands(query_BHK, key_bias_GK, key_rotary, padded, tokens: int, length: int, share: bool):
    """Coefficients [B, heads, K] of cos and sin; cos, and sin and −sin, of each block's start; the first block's table.

    With c = q₁b₁ + q₂b₂ and s = q₂b₁ − q₁b₂ a bias adds c · cos p + s · sin p; for p = start + i that is
    (c · cos start + s · sin start) · cos i + (s · cos start − c · sin start) · sin i. Of a share of a longer cache the
    first block starts at no angle of 0, and its table is turned back by that.
    """
    B, H, K = query_BHK.shape
    queries = H // key_bias_GK.shape[0]
    first, second = jnp.split(query_BHK.astype(jnp.float32), 2, axis=-1)
    bias_first, bias_second = jnp.split(jnp.repeat(key_bias_GK.astype(jnp.float32), queries, axis=0)[None], 2, axis=-1)
    with_cos = first * bias_first + second * bias_second
    with_sin = second * bias_first - first * bias_second
    coefficients = padded(jnp.concatenate([with_cos, with_sin], -1)).reshape(B, -1, K)
    cos, sin = key_rotary
    # Both tables carry YaRN's factor, which must count once; at position 0 the cosine is the factor itself.
    first_cos, first_sin, factor = (
        turned_back(cos, sin, tokens) if share else (cos[:, :tokens], sin[:, :tokens], cos[:, :1])
    )
    block_starts = np.arange(0, length, tokens)
    start_cos, start_sin = (table[:, block_starts] / factor for table in (cos, sin))
    halves = jnp.concatenate([start_cos, start_cos, start_sin, -start_sin], -1)
    base = halves.reshape(*halves.shape[:2], 2, K)
    rest = jnp.concatenate([first_cos, first_sin], -1)
    rest = jnp.pad(rest, ((0, 0), (0, max(tokens - length, 0)), (0, 0)))
    parts = []
    for _ in range(PARTS):
        part = lax.reduce_precision(rest, 8, 7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return coefficients, base, jnp.stack(parts, 1)


def _body(scalars, query_ref, keys_ref, values_ref, *refs, scale, length, window, quantized, biased, share):
    refs = list(refs)
    scale_refs = [refs.pop(0) for _ in range(4)] if quantized else []
    bias_refs = [refs.pop(0) for _ in range(3)] if biased else []
    out_ref = refs.pop(0)
    log_ref = refs.pop(0) if share else None
    highest, total, attended, *rest = refs
    slot, block = pl.program_id(0), pl.program_id(1)
    heads, rows, _ = query_ref.shape
    tokens = keys_ref.shape[1]
    valid = jnp.clip(scalars[1 + slot], 1, length)
    oldest = jnp.int32(0) if window is None else jnp.maximum(valid - window, 0)
    place = lax.div(oldest, jnp.int32(tokens)) + block
    start = place * tokens

    @pl.when(block == 0)
    def _():
        highest[...] = jnp.full(highest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        attended[...] = jnp.zeros(attended.shape, jnp.float32)

    @pl.when(start < valid)
    def _():
        if quantized:
            scales = rest[0]
            for number, ref in enumerate(scale_refs):
                scales[number] = tpu.float_of_half_bits(ref[...].astype(jnp.int32))
        if biased:
            rest[1][...] = _bias_logits(*bias_refs)
        position = start + lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
        seen = (position < valid) & (position >= oldest)
        # Of a token that no one wrote a float is anything, also NaN, which a weight of 0 does not cancel.
        place_of_row = start + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
        row_seen = place_of_row < valid

        def attend(head):
            query = query_ref[head]
            keys = _as_bfloat16(keys_ref[head]) if quantized else keys_ref[head]
            logits = lax.dot_general(query, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            if quantized:
                key_scale, key_minimum, value_scale, value_minimum = (
                    rest[0][number, pl.ds(head, 1)] for number in range(4)
                )
                query_sum = jnp.sum(query.astype(jnp.float32), axis=1, keepdims=True)
                logits = logits * key_scale + query_sum * key_minimum
            if biased:
                first = head if rows == 1 else pl.multiple_of(head * rows, rows)
                logits = logits + rest[1][pl.ds(first, rows)]
            logits = jnp.where(seen, logits * scale, MASKED)
            before = highest[head][:, :1]
            now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weight = jnp.where(seen, jnp.exp(logits - now), 0.0)
            fade = jnp.exp(before - now)
            total[head] = total[head] * fade + jnp.sum(weight, axis=1, keepdims=True)
            highest[head] = jnp.broadcast_to(now, highest.shape[1:])
            if quantized:
                scaled = jnp.where(seen, weight * value_scale, 0.0)
                middle = jnp.where(seen, weight * value_minimum, 0.0) + 128.0 * scaled
                offset = jnp.sum(middle, axis=1, keepdims=True)
                values = _as_bfloat16(values_ref[head], 128)
            else:
                scaled, offset = weight, 0.0
                values = jnp.where(row_seen, values_ref[head].astype(jnp.float32), 0.0).astype(jnp.bfloat16)
            product = jnp.dot(scaled.astype(jnp.bfloat16), values, preferred_element_type=jnp.float32)
            attended[head] = attended[head] * fade + product + offset

        turn = next(size for size in (HEADS_A_TURN, 2, 1) if heads % size == 0)

        def attend_some(index, _):
            for number in range(turn):
                attend(index * turn + number)
            return 0

        lax.fori_loop(0, heads // turn, attend_some, 0)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = (attended[...] / total[...][:, :, :1]).astype(out_ref.dtype)
        if log_ref is not None:
            log_ref[...] = highest[...] + jnp.log(total[...])


def _as_bfloat16(units, middle: int = 0):
    """uint8 − middle, exactly."""
    return (units.astype(jnp.int32) - middle).astype(jnp.float32).astype(jnp.bfloat16)


def _bias_logits(coefficients, base, table):
    """float32 [heads, tokens] of one block; see `_bias_operands`."""
    straight = coefficients[...]
    half = straight.shape[1] // 2
    crossed = jnp.concatenate([straight[:, half:], straight[:, :half]], axis=1)
    rest = straight * base[0:1] + crossed * base[1:2]
    parts = []
    for _ in range(PARTS):
        part = rest.astype(jnp.bfloat16)
        parts.append(part)
        rest = rest - part.astype(jnp.float32)
    contract = (((1,), (1,)), ((), ()))
    logits = None
    for number in reversed(range(PARTS)):  # smallest products first
        for part in reversed(parts[: PARTS - number]):
            product = lax.dot_general(part, table[number], contract, preferred_element_type=jnp.float32)
            logits = product if logits is None else logits + product
    return logits
