"""Attention within a prompt on a TPU: JAX's own splash attention, which skips blocks that no query sees."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels import tpu

LANES = 128
LONGEST_BLOCK = 512
BLOCKS = ("block_q", "block_kv", "block_kv_compute")
BLOCKS += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")  # of the derivatives


def unsupported(tokens: int, head_dim: int, dtype: str, chip: str) -> str | None:
    """None, or why this form cannot run a prompt of `tokens` on `chip`."""
    if reason := tpu.refusal(chip):
        return reason
    if dtype != "bfloat16":
        return f"it computes in bfloat16, not {dtype}"
    if tokens % LANES or head_dim % LANES:
        return f"tokens and head_dim must be multiples of {LANES}, got {tokens} and {head_dim}"
    return None


def attend_prefill(query_BTHK, key_BTGK, value_BTGK, *, scale, sliding_window):
    """See `op.attend_prefill`. Padding stands on the right, where a causal mask hides it from every valid query."""
    B, T, H, K = query_BTHK.shape
    block = next(size for size in (LONGEST_BLOCK, 256, LANES) if T % size == 0)
    if sliding_window is None:
        mask: masks.Mask = masks.CausalMask((T, T))
    else:
        mask = masks.LocalMask((T, T), window_size=(sliding_window - 1, 0), offset=0)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * (B * H)),
        block_sizes=splash.BlockSizes(**dict.fromkeys(BLOCKS, block)),
    )

    def heads_first(array_BTHK):
        """[B · heads, T, K]: rows of a batch are further heads, each with its own keys."""
        return jnp.swapaxes(array_BTHK, 1, 2).reshape(-1, T, K)

    # It knows no scale. That of a head of 128 is no power of two: multiplied in float32, rounded once to bfloat16.
    scaled_BTHK = (query_BTHK.astype(jnp.float32) * scale).astype(query_BTHK.dtype)
    attended = kernel(heads_first(scaled_BTHK), heads_first(key_BTGK), heads_first(value_BTGK))
    return jnp.swapaxes(attended.reshape(B, H, T, K), 1, 2).astype(query_BTHK.dtype)
