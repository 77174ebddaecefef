"""A peer on an NVIDIA GPU: one decode step of Qwen v1 in PyTorch, as gpt-fast builds one, with random weights.

    python benchmarks/peers/torch_decode.py --models 7B --batch 1 --modes eager compiled
    python benchmarks/peers/torch_decode.py --models 72B --modes compiled --compile-layers

tinygemm's int4 matmul in groups of 128 (bfloat16: `--bits 16`), query, key and value in one matrix, gate and up in one,
a bfloat16 cache read by `scaled_dot_product_attention`, a bfloat16 head, greedy choice on the device. The whole step is
one captured CUDA graph; "compiled" captures what `torch.compile` (default mode) makes of it. Every step has the same
context, `--context` tokens, all of the cache, so attention needs no mask. Prints one JSON line a measurement.
"""

import argparse
import gc
import json
import math
import time

import torch
from torch.nn import functional

# layers, hidden, inner of the MLP, heads of 128, vocabulary
MODELS = {
    "1.8B": (24, 2048, 5504, 16, 151936),
    "7B": (32, 4096, 11008, 32, 151936),
    "14B": (40, 5120, 13696, 40, 152064),
    "72B": (80, 8192, 24576, 64, 152064),
    "tiny": (2, 256, 384, 2, 512),
}
GROUP = 128
HEAD = 128


class Matrix:
    """[in, out] in random int4 groups for tinygemm, or in bfloat16."""

    def __init__(self, in_features: int, out_features: int, bits: int, device: str):
        self.bits = bits
        if bits == 4:
            shape = (out_features, in_features // 2)
            packed = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
            self.weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
            scales_zeros = torch.zeros(in_features // GROUP, out_features, 2, device=device, dtype=torch.bfloat16)
            scales_zeros[..., 0] = math.sqrt(12 / in_features) / 16  # outputs about as large as inputs
            self.scales_zeros = scales_zeros
        else:
            weight = torch.empty(out_features, in_features, device=device, dtype=torch.bfloat16)
            self.weight = weight.normal_(std=in_features**-0.5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in] to [batch, out]."""
        if self.bits == 4:
            return torch.ops.aten._weight_int4pack_mm(x, self.weight, GROUP, self.scales_zeros)
        return functional.linear(x, self.weight)


def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """RMSNorm, the mean in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, 128], halves rotated against each other."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Layer:
    """One decoder layer and its share of the cache."""

    def __init__(self, hidden: int, inner: int, heads: int, bits: int, batch: int, context: int, device: str):
        self.heads = heads
        self.qkv = Matrix(hidden, 3 * hidden, bits, device)
        self.output = Matrix(hidden, hidden, bits, device)
        self.gate_up = Matrix(hidden, 2 * inner, bits, device)
        self.down = Matrix(inner, hidden, bits, device)
        self.bias = torch.zeros(3 * hidden, device=device, dtype=torch.bfloat16)
        self.norms = [torch.ones(hidden, device=device, dtype=torch.bfloat16) for _ in range(2)]
        shape = (batch, heads, context, HEAD)
        self.keys, self.values = (
            torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=0.5) for _ in range(2)
        )

    def __call__(self, x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch, hidden] to the same; writes the cache at `position`."""
        joint = self.qkv(norm(x, self.norms[0])) + self.bias
        query, key, value = joint.view(x.shape[0], 3, self.heads, HEAD).unbind(1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        self.keys[:, :, position] = key.unsqueeze(2)
        self.values[:, :, position] = value.unsqueeze(2)
        attended = functional.scaled_dot_product_attention(query.unsqueeze(2), self.keys, self.values)
        x = x + self.output(attended.reshape(x.shape[0], -1))
        gate, up = self.gate_up(norm(x, self.norms[1])).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Step:
    """The whole step: reads `self.token`, writes the next one there."""

    def __init__(self, model: str, bits: int, batch: int, context: int, device: str, layers: int | None):
        depth, hidden, inner, heads, vocabulary = MODELS[model]
        self.layers = [Layer(hidden, inner, heads, bits, batch, context, device) for _ in range(layers or depth)]
        self.embedding = torch.empty(vocabulary, hidden, device=device, dtype=torch.bfloat16).normal_()
        self.head = torch.empty(vocabulary, hidden, device=device, dtype=torch.bfloat16).normal_(std=hidden**-0.5)
        self.norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        self.token = torch.zeros(batch, device=device, dtype=torch.long)
        self.position = torch.full((1,), context - 1, device=device, dtype=torch.long)
        frequencies = 1e4 ** (-torch.arange(0, HEAD, 2, device=device).float() / HEAD)
        angles = torch.arange(context, device=device).float()[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()
        self.call_layer = Layer.__call__

    def __call__(self) -> None:
        """One step of all rows."""
        x = self.embedding[self.token]
        cos, sin = self.cos[self.position], self.sin[self.position]
        for layer in self.layers:
            x = self.call_layer(layer, x, self.position, cos, sin)
        logits = functional.linear(norm(x, self.norm), self.head)
        self.token.copy_(logits.argmax(-1))


def time_graph(step, steps: int, rounds: int) -> list[float]:
    """Milliseconds a step of a captured graph of it, one number a round, in rising order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / steps)
    return sorted(times)


def measure(model: str, batch: int, mode: str, options: argparse.Namespace) -> dict:
    """One record."""
    torch.cuda.reset_peak_memory_stats()
    step = Step(model, options.bits, batch, options.context, "cuda", options.layers)
    run = step
    begin = time.perf_counter()
    if mode == "compiled" and options.compile_layers:
        step.call_layer = torch.compile(Layer.__call__)  # once: a layer's tensors are inputs of the graph
    elif mode == "compiled":
        run = torch.compile(step.__call__)
    times = time_graph(run, options.steps, options.rounds)
    milliseconds = times[len(times) // 2]
    return {
        "tokens_per_second": round(batch * 1e3 / milliseconds, 1),
        "step_ms": round(milliseconds, 4),
        "step_ms_fastest": round(times[0], 4),
        "step_ms_slowest": round(times[-1], 4),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "preparation_s": round(time.perf_counter() - begin, 1),
        "finite": bool(torch.isfinite(step.layers[-1].keys[:, :, -1]).all()),
    }


def main() -> None:
    """Measures every case asked for; one that fails is printed as such and the others still run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["7B"], choices=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4, choices=[4, 16])
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile-layers", action="store_true", help="compile one layer instead of the whole step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(3, "torch_decode.py: no CUDA device.\n")
    torch.manual_seed(0)
    for model in options.models:
        for batch in options.batch:
            for mode in options.modes:
                record = {
                    "peer": "torch",
                    "kind": "decode",
                    "model": model,
                    "batch": batch,
                    "context": options.context,
                    "bits": options.bits,
                    "kv_bits": 16,
                    "mode": mode,
                    "compiled": None if mode == "eager" else "layer" if options.compile_layers else "step",
                    "layers": options.layers or MODELS[model][0],
                    "card": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                }
                try:
                    with torch.no_grad():
                        record |= measure(model, batch, mode, options)
                except Exception as error:
                    record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                print(json.dumps(record), flush=True)
                torch.compiler.reset()
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
