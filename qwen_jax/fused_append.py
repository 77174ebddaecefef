"""What a decode step does between the fused projection and attention, in one launch where a kernel takes it.

Elsewhere, and for prompts, it is several steps: `model.Attention._turned`.
"""

import functools
import logging

from pallas_kernels import kv_attention
from pallas_kernels.chip import default_chip, is_hopper

_logger = logging.getLogger(__name__)


def takes(attention, hidden_BTD, kv) -> bool:
    """Whether one launch takes the new token of a `model.Attention`; the log says why not where a chip could."""
    reason = refusal(attention, hidden_BTD, kv)
    if is_hopper(default_chip()):
        _log_choice(reason)
    return reason is None


def refusal(attention, hidden_BTD, kv) -> str | None:
    """None, or one sentence why not."""
    if len(attention.qkv.parts) != 1:
        return f"query, key and value are stored as {len(attention.qkv.parts)} matrices, not as one"
    if attention.cache_axis is not None:
        return "the cache is split along its length"
    return kv_attention.rotate_append_unsupported(kv, attention.heads, hidden_BTD.dtype, attention.kernels)


def run(attention, hidden_BTD, step, kv, layer, cache_layer):
    """(query_BHK, kv) of one new token a row; `takes` must hold."""
    qkv_BTX, rotary = attention.qkv.parts[0](hidden_BTD, layer), step.rotary
    norms = {}
    if attention.query_norm is not None:
        norms = dict(query_norm_LK=attention.query_norm.scale, key_norm_LK=attention.key_norm.scale)
        norms |= dict(epsilon=attention.query_norm.epsilon)
    return kv_attention.rotate_append(
        qkv_BTX[:, 0],
        kv,
        cache_layer,
        step.start_B,
        heads=attention.heads,
        rotary=(rotary.cos_BTK, rotary.sin_BTK),
        logn_B=None if rotary.logn_BT is None else rotary.logn_BT[:, 0],
        stack_layer=layer,
        key_bias_LX=attention.key_bias,
        kernels=attention.kernels,
        **norms,
    )


@functools.cache
def _log_choice(reason: str | None) -> None:
    form = "in one launch" if reason is None else f"in several, not one launch: {reason}"
    _logger.info("a new token is turned and written %s", form)
