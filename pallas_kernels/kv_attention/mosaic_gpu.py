"""Attention over the cache on Hopper GPUs: where it runs.

The kernels: `mosaic_gpu_decode`, `mosaic_gpu_append`, `mosaic_gpu_rotate_append`.

Mosaic GPU takes 0.6 s to import, so these functions import it when a GPU asks for them.
"""

from pallas_kernels.chip import HOPPER, is_hopper

TAKES_STACKED_BIAS = True


def unsupported(shape, chip: str) -> str | None:
    """None, or one sentence why this kernel cannot run an `op.AttentionShape` on a chip."""
    share = shape.heads // shape.kv_heads
    if not is_hopper(chip):  # tensor memory access and 227 KB of shared memory a block
        return f"it is written for Hopper GPUs ({', '.join(HOPPER)}), not for {chip}"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"its queries are bfloat16 or float16, not {shape.dtype}"
    if shape.window:
        return "a share's sliding window differs from slot to slot, and its windows are of one size"
    if shape.heads % shape.kv_heads or share > 8:
        return f"it takes 1 to 8 query heads a key/value head, not {shape.heads} for {shape.kv_heads}"
    if shape.head_dim % 32 or shape.head_dim > 128:
        return f"its head sizes are 32, 64, 96 and 128, not {shape.head_dim}"
    if shape.length % 8:
        return f"a cache's length must be a multiple of 8 (its tiles are copied in rows of 8), not {shape.length}"
    from pallas_kernels.kv_attention.mosaic_gpu_decode import MULTIPROCESSORS
    from pallas_kernels.kv_attention.mosaic_gpu_schedule import Schedule

    if not Schedule(shape.slots, shape.kv_heads, shape.length, 64, 4 * MULTIPROCESSORS, None).fits:
        return (
            f"{shape.slots} slots of {shape.length} tokens and {shape.kv_heads} heads overflow its 32-bit tile count."
        )
    return None


def append(kv, layer, key_BTGK, value_BTGK, start_B, share: bool = False):
    """See `op.append`."""
    del share  # positions outside of the cache are never written
    from pallas_kernels.kv_attention import mosaic_gpu_append

    return mosaic_gpu_append.append(kv, layer, key_BTGK, value_BTGK, start_B)


def rotate_append(qkv_BX, kv, layer, start_B, **options):
    """See `op.rotate_append`."""
    from pallas_kernels.kv_attention import mosaic_gpu_rotate_append

    return mosaic_gpu_rotate_append.rotate_append(qkv_BX, kv, layer, start_B, **options)


def attend_decode(query_BHK, kv, layer, lengths_B, **options):
    """See `op.attend_decode`."""
    from pallas_kernels.kv_attention import mosaic_gpu_decode

    return mosaic_gpu_decode.attend_decode(query_BHK, kv, layer, lengths_B, **options)
