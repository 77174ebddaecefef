"""Times GPTQ on decoder layers of 7B dimensions: seconds a layer and a module, and a whole model by extrapolation.

    python benchmarks/quantize_layer.py --output result.json

Writes a random float checkpoint of a few layers (4096 wide, 11008 inside, 32 heads, bfloat16) and quantizes it through
the public function, calibrated on 128 rows of 2048 random tokens. The first layer compiles; the last one is the figure.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwen_jax.bench.environment import environment
from qwen_jax.quantize import QuantizeSettings, quantize
from qwen_jax.quantize.gptq import quantize_matrix
from qwen_jax.quantize.hessian import Moments
from qwen_jax.quantize.pipeline import calibration_dtype
from qwen_jax.quantize.streams import BATCH_TOKENS

VOCABULARY = 1024
WHOLE = 32  # layers of the whole model


def write_checkpoint(folder: Path, layers: int, hidden: int, inner: int, heads: int, length: int) -> None:
    """A Hugging Face folder of family qwen2 with random weights."""
    rng = np.random.default_rng(0)

    def matrix(out_features: int, in_features: int) -> np.ndarray:
        values = rng.standard_normal((out_features, in_features), np.float32)
        return (values / np.sqrt(in_features)).astype(ml_dtypes.bfloat16)

    ones = np.ones(hidden, ml_dtypes.bfloat16)
    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, hidden),
        "lm_head.weight": matrix(VOCABULARY, hidden),
        "model.norm.weight": ones,
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = tensors[f"{prefix}.post_attention_layernorm.weight"] = ones
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(hidden, hidden)
            if name != "o":
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = np.full(hidden, 0.1, ml_dtypes.bfloat16)
        for name in ("gate", "up"):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = matrix(inner, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=length,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        hidden_act="silu",
    )
    (folder / "config.json").write_text(json.dumps(config))


def parts(settings: QuantizeSettings, hidden: int, inner: int, tokens: int) -> dict[str, dict[str, float]]:
    """Seconds of each piece of a layer, the second of two runs; moments: of all calibration tokens."""
    found, matrix = {}, settings.matrix("model.layers.0.mlp.down_proj", settings.parsed())
    assert matrix is not None
    dtype = jnp.dtype(calibration_dtype(jax.devices()[0]))
    for name, in_features, out_features, inputs_missing in (
        ("query, key, value", hidden, 3 * hidden, True),
        ("output", hidden, hidden, False),
        ("gate, up", hidden, 2 * inner, True),
        ("down", inner, hidden, False),
    ):
        keys = jax.random.split(jax.random.key(0), 4)
        weight_IO = jax.random.normal(keys[0], (in_features, out_features)) / np.sqrt(in_features)
        x_BTI = jax.random.normal(keys[1], (2, BATCH_TOKENS // 2, in_features), dtype)
        missing = jax.random.normal(keys[2], x_BTI.shape, dtype) if inputs_missing else None
        missing_y = None if inputs_missing else jax.random.normal(keys[3], (*x_BTI.shape[:2], out_features))
        mask_BT, count = jnp.ones(x_BTI.shape[:2]), 4
        for _ in range(2):
            jax.block_until_ready((weight_IO, x_BTI, missing, missing_y))
            times, moments = [time.perf_counter()], Moments(in_features)
            for _ in range(count):
                moments.add(x_BTI, mask_BT, missing, missing_y)
            jax.block_until_ready((moments.hessian(), moments.cross(weight_IO)))
            times.append(time.perf_counter())
            # Few batches leave H singular; a real one is not.
            hessian_II = moments.hessian() + jnp.eye(in_features)
            cross_IO = 0.01 * weight_IO
            for cross in (None, cross_IO):
                jax.block_until_ready(quantize_matrix(weight_IO, hessian_II, matrix, cross_IO=cross).weight_IO)
                times.append(time.perf_counter())
        moment_seconds, plain, moved = np.diff(times)
        found[name] = {
            "moments": moment_seconds * tokens / (count * BATCH_TOKENS),
            "solve": plain,
            "solve_with_propagation": moved,
        }
    return found


def main() -> None:
    """Measures one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs=3, default=(4096, 11008, 32), help="hidden, inner, heads")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a field of QuantizeSettings")
    parser.add_argument("--parts", action="store_true", help="time the pieces of a layer by themselves, too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (s.partition("=") for s in arguments.set)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float"
        source.mkdir()
        write_checkpoint(source, arguments.layers, *arguments.sizes, arguments.length)
        rows = list(np.random.default_rng(1).integers(0, VOCABULARY, (arguments.rows, arguments.length)))
        times = [("start", time.perf_counter())]

        def note(report, done, total):
            times.append((report.path, time.perf_counter()))
            print(f"{done}/{total} {report.path} {times[-1][1] - times[-2][1]:.2f} s", flush=True)

        quantize(source, Path(folder) / "quantized", rows, QuantizeSettings(**settings), progress=note)
    modules = (len(times) - 1) // arguments.layers
    last = times[-modules - 1 :]
    seconds = last[-1][1] - last[0][1]
    result = {
        "environment": environment() | {"command": " ".join(["python", *sys.argv])},
        "sizes": list(arguments.sizes),
        "calibration": [arguments.rows, arguments.length],
        "settings": settings,
        "seconds_first_layer": times[modules][1] - times[0][1],
        "seconds_last_layer": seconds,
        "seconds_modules": {b[0]: round(b[1] - a[1], 3) for a, b in zip(last, last[1:], strict=False)},
        "minutes_of_32_layers": (times[-1][1] - times[0][1] + (WHOLE - arguments.layers) * seconds) / 60,
        "minutes_of_32_layers_compiled_before": seconds * WHOLE / 60,
    }
    statistics = jax.devices()[0].memory_stats() or {}
    result["peak_device_bytes"] = statistics.get("peak_bytes_in_use")
    _write(result, arguments.output)
    if arguments.parts:
        tokens = arguments.rows * arguments.length
        result["parts"] = parts(QuantizeSettings(**settings), *arguments.sizes[:2], tokens)
        _write(result, arguments.output)


def _write(result: dict, file: Path | None) -> None:
    print(json.dumps(result), flush=True)
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
