"""A decode step in NumPy float64: what the kernel is compared with. Shares no code with it."""

import numpy as np

from pallas_kernels.kv_attention import reference as attention


def norm(x, scale, epsilon):
    """RMS norm over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * np.asarray(scale, np.float64)


def decode_step(x_BD, layers, kv, lengths_B, rotary, *, epsilon, scale, key_rotary=None, logn_B=None, window=None,
                first_layer=0):  # fmt: skip
    """(hidden [B, D] float64, the cache with the new token).

    Args:
        x_BD: [B, D].
        layers: for each layer a dict of float64 matrices qkv, output, gate_up, down and of vectors as in
            `op.LayerWeights`.
        kv: `KVArrays`, NumPy.
        lengths_B: valid tokens, the new one included.
        rotary: (cos, sin) [B or 1, K/2].
        epsilon: of the norms.
        scale: factor on the logits.
        key_rotary: (cos, sin) [B or 1, S, K/2].
        logn_B: factor of the queries.
        window: sliding window.
        first_layer: the cache's layer of layer 0.
    """
    x = np.asarray(x_BD, np.float64)
    B = len(x)
    G, K = kv.keys.shape[2], kv.keys.shape[4]
    cos, sin = (np.asarray(table, np.float64)[:, None] for table in rotary)
    for number, layer in enumerate(layers):
        H = layer["output"].shape[0] // K
        joint = norm(x, layer["attention_norm"], epsilon) @ layer["qkv"]
        if layer.get("qkv_bias") is not None:
            joint = joint + layer["qkv_bias"]
        query, key, value = np.split(joint, [H * K, (H + G) * K], axis=-1)
        query, key, value = query.reshape(B, H, K), key.reshape(B, G, K), value.reshape(B, G, K)
        if layer.get("query_norm") is not None:
            query, key = norm(query, layer["query_norm"], epsilon), norm(key, layer["key_norm"], epsilon)
        bias = layer.get("key_bias")
        bias = None if bias is None else np.asarray(bias, np.float64).reshape(G, K)
        if bias is not None and not kv.quantized:
            key, bias = key + bias, None
        query, key = attention.rotate(query, cos, sin), attention.rotate(key, cos, sin)
        if logn_B is not None:
            query = query * np.asarray(logn_B, np.float64)[:, None, None]
        place = first_layer + number
        kv = attention.append(kv, place, key[:, None], value[:, None], np.asarray(lengths_B) - 1)
        attended = attention.attend_decode(
            query, kv, place, lengths_B, scale=scale, key_bias_GK=bias,
            key_rotary=None if bias is None else key_rotary, sliding_window=window,
        )  # fmt: skip
        x = x + attended.reshape(B, H * K) @ layer["output"]
        gate, up = np.split(norm(x, layer["mlp_norm"], epsilon) @ layer["gate_up"], 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]
    return x, kv
