"""The key/value cache: allocated once, one length a slot, donated to each step and updated in place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention import KVArrays, scale_dtype
from qwen_jax.config import ModelConfig
from qwen_jax.errors import ConsumedCacheError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheState:
    """A cache as a pytree, for use inside jit.

    Attributes:
        kv: arrays [L, B, G, S, K], keys rotated; the 8-bit form holds keys without their bias (see `KVArrays`).
        lengths_B: int32 [B], tokens held in each slot; they lie at positions 0 … length − 1.
        ntk_alpha_B: float32 [B], stretch of the rotary base the keys were written with; None without dynamic NTK.
    """

    kv: KVArrays
    lengths_B: Any
    ntk_alpha_B: Any = None

    @classmethod
    def empty(cls, config: ModelConfig, slots: int, length: int, dtype: str, quantized: bool) -> "CacheState":
        """Room for `length` tokens in each of `slots` slots, holding none."""
        shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
        if quantized:
            scales = [jnp.zeros(shape[:-1], scale_dtype()) for _ in range(4)]
            kv = KVArrays(jnp.zeros(shape, jnp.uint8), jnp.zeros(shape, jnp.uint8), *scales)
        else:
            kv = KVArrays(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        alpha = jnp.ones(slots, jnp.float32) if config.use_dynamic_ntk else None
        return cls(kv, jnp.zeros(slots, jnp.int32), alpha)


def bytes_per_token(config: ModelConfig, dtype: str, quantized: bool) -> int:
    """Bytes one token takes in the cache, all layers together: data, and for 8 bits its scales and minimums."""
    per_head = config.head_dim + 4 if quantized else config.head_dim * jnp.dtype(dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * per_head


class KVCache:
    """A user's handle on a cache: `decode` consumes it and returns the next one.

    Its arrays are donated to the step that uses it, so a second use is an error instead of reading freed memory.
    """

    def __init__(self, state: CacheState, longest: int, room: int, slots: int):
        self._state: CacheState | None = state
        self.longest, self.room = longest, room  # tokens in the fullest slot, and the most a slot may hold
        self.slots = slots  # on a mesh the arrays may have more
        self.allocated = state.kv.keys.shape[3]
        self.nbytes = state.kv.nbytes

    @property
    def quantized(self) -> bool:
        """Whether keys and values are held in 8 bits."""
        return self._peek().kv.quantized

    @property
    def lengths(self):
        """int32 [B], tokens held in each slot."""
        return np.asarray(self._peek().lengths_B)[: self.slots]

    @property
    def nbytes_per_token(self) -> float:
        """Bytes of the arrays for each token of room."""
        return self.nbytes / (self.allocated * self.slots)

    def _peek(self) -> CacheState:
        if self._state is None:
            raise ConsumedCacheError(
                "cache: already consumed by an earlier decode() (its arrays were updated in place); expected the cache "
                "that call returned. Keep that one, or call prefill() again."
            )
        return self._state

    def take(self) -> CacheState:
        """The state, once: afterwards this handle is consumed."""
        state = self._peek()
        self._state = None
        return state
