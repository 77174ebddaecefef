"""Peers on an NVIDIA GPU, in PyTorch: tinygemm's int4 matmul (`_weight_int4pack_mm`) and cuBLAS in bfloat16.

    python benchmarks/peers/torch_matmul.py --shapes 4096x11008 --rows 1 16 64

Median µs a call: replays of a CUDA graph of 60 calls or more (12 from 512 rows up) over rotating weights of more than
256 MB. Prints one JSON line a measurement.
"""

import argparse
import json
import math

import torch

SHAPES = ("4096x11008", "4096x12288", "11008x4096", "2048x5504", "8192x24576")
ROTATE_BYTES = 280e6


def graph_time(calls, rows: int, repeats: int = 15) -> float:
    """Median µs a call of a captured graph.

    Args:
        calls: functions without arguments, one for each of the rotating weights.
        rows: of the activations: fewer calls make the graph where one is long.
        repeats: replays, each timed.
    """
    calls = list(calls) * math.ceil((60 if rows < 512 else 12) / len(calls))
    torch.cuda.synchronize()  # operands are made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[repeats // 2]


def report(peer: str, in_features: int, out_features: int, rows: int, make, size: float) -> None:
    """Measures and prints one JSON line; a case that cannot run is printed as such.

    Args:
        peer: its name.
        in_features: of the matrix.
        out_features: likewise.
        rows: of the activations.
        make: as `tinygemm`.
        size: bytes of a matrix.
    """
    record = {
        "peer": peer,
        "kind": "matmul",
        "in": in_features,
        "out": out_features,
        "rows": rows,
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    try:
        calls = make(rows, in_features, out_features, max(4, int(ROTATE_BYTES // size) + 1))
        record["us"] = round(graph_time(calls, rows), 2)
    except Exception as error:
        record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    print(json.dumps(record), flush=True)


def tinygemm(rows: int, in_features: int, out_features: int, count: int):
    """Calls of int4 g128 matmuls with different weights."""
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    weights = []
    for _ in range(count):
        bytes_ = torch.randint(0, 256, (out_features, in_features // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
        scales = torch.rand(in_features // 128, out_features, 2, device="cuda").to(torch.bfloat16)
        weights.append((packed, scales))
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1]) for w in weights]


def cublas(rows: int, in_features: int, out_features: int, count: int):
    """Calls of bfloat16 matmuls with different weights."""
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def main() -> None:
    """Measures every shape and number of rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 8, 16, 32, 64, 256, 2048])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(3, "torch_matmul.py: no CUDA device.\n")
    for shape in arguments.shapes:
        in_features, out_features = map(int, shape.split("x"))
        for peer, make, limit, size in (
            ("tinygemm", tinygemm, 16, in_features * out_features / 2),
            ("cublas", cublas, 1 << 30, in_features * out_features * 2),
        ):
            for rows in arguments.rows:
                if rows <= limit:  # above, measured elsewhere, it takes 4 to 15 times as long as the others
                    report(peer, in_features, out_features, rows, make, size)


if __name__ == "__main__":
    main()
