"""Portable twins of the Mosaic GPU kernels' inline arithmetic, in jax.numpy, for the GPU interpreter.

They take the same references and keep the same contract, so that what runs under the interpreter is the kernels' own
structure: the division of tiles among blocks, TMA copies, barriers, the ring, segments, slices and the scatter.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_attention.mosaic_gpu_schedule import locate_portable
from pallas_kernels.kv_attention.xla import quantize


class PortableMerge:
    """The twin of `FastMerge`: one softmax a block instead of four, in plain float32."""

    locate = staticmethod(locate_portable)

    def __init__(self, shape):
        self.shape = shape

    def table(self, cos, sin, slot):
        return jnp.stack([table[slot, pl.ds(0, self.shape.tokens), :] / cos[slot, 0, 0] for table in (cos, sin)])

    def start(self, query, bias=None):
        shape = self.shape
        query = query[...].astype(jnp.float32)
        if bias is not None:
            bias_GK, head, terms = bias
            q1, q2 = jnp.split(query * shape.scale, 2, axis=-1)
            b1, b2 = jnp.split(bias_GK[head].astype(jnp.float32), 2)
            terms[...] = jnp.stack([q1 * b1 + q2 * b2, q2 * b1 - q1 * b2], axis=-1)
        state = (
            jnp.zeros((shape.share, shape.head_dim), jnp.float32),
            jnp.full((shape.share, 1), -1e30, jnp.float32),
            jnp.zeros((shape.share, 1), jnp.float32),
        )
        return query, state

    def tile(self, setup, state, keys, values, scales, low, high, bias=None):
        shape = self.shape
        query = setup
        acc, top, total = state
        keys, values = keys[...].astype(jnp.float32), values[...].astype(jnp.float32)
        scales = [ref[...].astype(jnp.float32) for ref in scales]
        logits = query @ keys.T * shape.scale
        if scales:
            logits = logits * scales[0] + query.sum(-1, keepdims=True) * shape.scale * scales[1]
        if bias is not None:
            logits = logits + self._bias(bias)
        row = jnp.arange(shape.tokens)
        seen = (row >= low) & (row < high)
        logits = jnp.where(seen, logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        decay, weight = jnp.exp(top - new_top), jnp.exp(logits - new_top)
        total = total * decay + weight.sum(-1, keepdims=True)
        acc = acc * decay
        if scales:
            acc = acc + (weight * scales[2]) @ values + (weight * scales[3]).sum(-1, keepdims=True)
        else:
            acc = acc + weight @ jnp.where(seen[:, None], values, 0.0)
        return acc, new_top, total

    @staticmethod
    def _bias(bias):
        table, cos, sin, terms, _ = bias
        with_cos, with_sin, c, s = terms[..., 0], terms[..., 1], cos[...], sin[...]
        new_cos, new_sin = with_cos * c + with_sin * s, with_sin * c - with_cos * s
        return new_cos @ table[0].T + new_sin @ table[1].T

    def finish(self, state, scratch, out, partial, statistics, *, row, slice_index, complete):
        del scratch
        acc, top, total = state

        @pl.when(complete == 1)
        def _():
            out[pl.ds(row, self.shape.share), :] = (acc / total).astype(out.dtype)

        @pl.when(complete == 0)
        def _():
            partial[slice_index] = acc
            statistics[slice_index] = jnp.concatenate([top, total], axis=-1)


class PortableAppend:
    """The twin of `FastAppend`."""

    def __init__(self, shape):
        self.shape = shape

    def rows(self, block, layer, key, value, start, cache):
        shape = self.shape
        _, _, G, S, K = shape.cache
        for warp in range(4):
            row = block * 4 + warp
            head, token, slot = row % G, row // G % shape.tokens, row // (G * shape.tokens)

            @pl.when(row < shape.rows)
            def _(head=head, token=token, slot=slot):
                position = start[slot] + token
                x, y = (ref[slot, token, head].astype(jnp.float32) for ref in (key, value))

                @pl.when((position >= 0) & (position < S))
                def _():
                    parts = [x, y]
                    if shape.quantized:
                        (x8, *x_scales), (y8, *y_scales) = quantize(x), quantize(y)
                        parts = [x8, y8, *x_scales, *y_scales]
                    for array, part in zip(cache, parts, strict=True):
                        array[layer, slot, head, position] = part.astype(array.dtype)


class PortableRotate:
    """The twin of `FastRotate`."""

    def __init__(self, shape):
        self.shape = shape

    def rows(self, block, refs):
        for warp in range(4):
            row = block * 4 + warp
            pl.when(row < self.shape.rows)(functools.partial(self._head, row // self.shape.width, row, refs))

    def _head(self, slot, row, refs):
        shape = self.shape
        _, _, G, S, K = shape.cache
        head, dtype, layer = row % shape.width, jnp.dtype(shape.dtype), refs["layer"][0]
        x = refs["qkv"][slot, pl.ds(head * K, K)].astype(jnp.float32)

        def rounded(x):
            return x.astype(dtype).astype(jnp.float32)

        def normed(name):
            if shape.norm_dtype is None:
                return x
            scale = refs[name][refs["stack_layer"][0]].astype(jnp.float32)
            return rounded(x * (1.0 / jnp.sqrt((x * x).mean() + shape.epsilon)) * scale)

        def turned(x):
            cos, sin = (refs[name][slot if shape.tables > 1 else 0] for name in ("cos", "sin"))
            low, high = jnp.split(x, 2)
            return rounded(jnp.concatenate([low * cos - high * sin, high * cos + low * sin]))

        def write(kind, number, x):
            position = refs["start"][slot]

            @pl.when((position >= 0) & (position < S))
            def _():
                names = [f"{kind}s", f"{kind}_scales", f"{kind}_minimums"]
                parts = quantize(x) if shape.quantized else [x]
                for name, part in zip(names, parts, strict=False):
                    refs[name][layer, slot, number, position] = part.astype(refs[name].dtype)

        @pl.when(head < shape.heads)
        def _():
            y = turned(normed("query_norm"))
            y = y * rounded(refs["logn"][slot]) if shape.logn else y
            refs["query"][slot, head] = y.astype(dtype)

        @pl.when((head >= shape.heads) & (head < shape.heads + G))
        def _():
            y, number = normed("key_norm"), head - shape.heads
            if shape.bias_dtype is not None:
                bias = refs["key_bias"][refs["stack_layer"][0], pl.ds(number * K, K)]
                y = rounded(y + rounded(bias.astype(jnp.float32)))
            write("key", number, turned(y))

        @pl.when(head >= shape.heads + G)
        def _():
            write("value", head - shape.heads - G, x)
