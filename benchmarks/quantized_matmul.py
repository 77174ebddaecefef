"""Times the quantized matmul of a Hopper GPU at true dimensions, with random weights made on the device.

    python benchmarks/quantized_matmul.py --shapes 4096x11008 --rows 1 16 64 --output results.json

Median µs a call: one jitted chain of calls, each waiting for the one before, over rotating weights of more than 256 MB
(so that the 50 MB of L2 help nobody). The floor is the bytes of packed weights and scales over the rate of a
device-to-device copy measured in the same run. Shapes compile in parallel processes and are timed one after another.
`--tilings FILE` adds tilings to try ({"KxN": {"rows": [[...], ...]}}), the fastest of which can go into `tuned/`.
"""

import argparse
import datetime
import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

SHAPES = ("4096x11008", "4096x12288", "11008x4096", "2048x5504", "8192x24576")
ROWS = (1, 4, 8, 16, 32, 64, 256, 2048)
ROTATE_BYTES = 280e6
CHECKED_ROWS = 16


def random_weight(in_features: int, out_features: int, bits: int, group_size: int, key):
    """A symmetric weight in layout "mosaic_gpu" with bfloat16 scales."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
    from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

    columns = -(-out_features // layout.PADDING) * layout.PADDING
    shape = (layout.chunks(in_features), columns // layout.STRIP, 64 * bits)
    words_key, scales_key = jax.random.split(key)
    packed = jax.lax.bitcast_convert_type(jax.random.bits(words_key, shape, jnp.uint32), jnp.int32)
    scales = jax.random.uniform(scales_key, (-(-in_features // group_size), columns)) * 0.01 + 0.002
    padding = columns - out_features
    return QuantizedTensor(
        packed, scales.astype(jnp.bfloat16), None, None, bits, group_size, in_features, layout.LAYOUT, padding
    )


def median_time(run, calls: int, repeats: int = 9) -> float:
    """µs of `run()`, median over repeats of `calls` dispatches."""
    import jax

    for _ in range(2):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[repeats // 2] * 1e6


def copy_rate() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones((2**29,), jnp.bfloat16)
    copy = jax.jit(lambda a: a + 1)
    return 2 * array.nbytes / median_time(lambda: copy(array), 3) / 1e3


def worker(job: dict, meeting: pathlib.Path, workers: int) -> None:
    """Compiles the calls of one shape, waits for the other workers, then times them; prints JSON lines."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.quantized_matmul import mosaic_gpu
    from pallas_kernels.quantized_matmul import mosaic_gpu_large as large
    from pallas_kernels.quantized_matmul import mosaic_gpu_small as small
    from pallas_kernels.quantized_matmul.shapes import MatmulShape

    in_features, out_features, bits, group_size = job["in"], job["out"], job["bits"], job["group_size"]
    chip = jax.devices()[0].device_kind
    make = functools.partial(random_weight, in_features, out_features, bits, group_size)
    weight_bytes = in_features * out_features * bits / 8 + in_features // group_size * out_features * 2
    count = max(4, int(ROTATE_BYTES // weight_bytes) + 1)
    abstract = jax.eval_shape(make, jax.random.key(0))
    make = jax.jit(make).lower(jax.random.key(0)).compile()

    def reference(x_MI, weight):
        return jnp.dot(x_MI.astype(jnp.float32), mosaic_gpu.dequantize(weight, None), precision="highest")

    checked = jax.ShapeDtypeStruct((CHECKED_ROWS, in_features), jnp.bfloat16)
    reference = jax.jit(reference).lower(checked, abstract).compile()
    compiled = []
    for rows in job["rows"]:
        shape = MatmulShape(rows, in_features, out_features, bits, group_size, layout=mosaic_gpu.LAYOUT)
        tiling, origin = mosaic_gpu.choose_tiling(shape, chip)
        choices = [(tiling, origin)]
        for values in job["tilings"].get(str(rows), ()):
            extra = small.Tiling(*values) if len(values) == 3 else large.Tiling(*values)
            if extra != tiling:
                choices.append((extra, "tried"))
        repeats = max(1, round((60 if rows < 512 else 6) / count))
        x = jax.ShapeDtypeStruct((rows, in_features), jnp.bfloat16)
        for tiling, origin in choices:
            kernel = small if isinstance(tiling, small.Tiling) else large

            def chain(x_MI, weights, kernel=kernel, tiling=tiling, repeats=repeats):
                result = None
                for weight in list(weights) * repeats:
                    result = kernel.call(x_MI, weight, tiling=tiling, after=result)
                return result

            def single(x_MI, weight, kernel=kernel, tiling=tiling):
                return kernel.call(x_MI, weight, tiling=tiling)

            single = jax.jit(single).lower(x, abstract).compile()
            chain = jax.jit(chain).lower(x, [abstract] * count).compile()
            compiled.append((rows, tiling, origin, single, chain, count * repeats))
    (meeting / str(os.getpid())).touch()
    deadline = time.time() + job["patience"]
    while len(list(meeting.iterdir())) < workers and time.time() < deadline:
        time.sleep(0.1)
    with open(meeting.parent / "device.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if job["copy"]:
            print(json.dumps({"copy_GBs": round(copy_rate()), "card": chip, "jax": jax.__version__}), flush=True)
        weights = [make(key) for key in jax.random.split(jax.random.key(1), count)]
        x_MI = (jax.random.normal(jax.random.key(2), (max(2048, max(job["rows"])), in_features)) + 0.3).astype(
            jnp.bfloat16
        )
        want = np.asarray(reference(x_MI[:CHECKED_ROWS], weights[0]), np.float64)
        for rows, tiling, origin, single, chain, calls in compiled:
            x = x_MI[:rows]
            got = np.asarray(single(x, weights[0])[:CHECKED_ROWS], np.float64)
            error = np.linalg.norm(got - want[:rows]) / np.linalg.norm(want[:rows])
            entry = {
                "in": in_features,
                "out": out_features,
                "rows": rows,
                "bits": bits,
                "group_size": group_size,
                "us": round(median_time(lambda chain=chain, x=x: chain(x, weights), 3) / calls, 2),
                "bytes": int(weight_bytes),
                "error": float(f"{error:.2e}"),
                "tiling": list(tiling.__dict__.values()),
                "origin": origin,
            }
            print(json.dumps(entry), flush=True)


def main() -> None:
    """Runs one worker a shape and number of bits; prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="in x out, as 4096x11008")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--bits", nargs="*", type=int, default=[4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tilings", type=pathlib.Path, help="JSON of tilings to try besides the chosen one")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for the other workers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        job = json.loads(arguments.worker)
        worker(job, pathlib.Path(job["meeting"]), job["workers"])
        return
    tilings = json.loads(arguments.tilings.read_text()) if arguments.tilings else {}
    pairs = [(shape, bits) for bits in arguments.bits for shape in arguments.shapes]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        meeting = pathlib.Path(folder) / "ready"
        meeting.mkdir()
        processes = []
        for number, (shape, bits) in enumerate(pairs):
            in_features, out_features = map(int, shape.split("x"))
            job = {
                "in": in_features,
                "out": out_features,
                "bits": bits,
                "group_size": arguments.group_size,
                "rows": list(arguments.rows),
                "tilings": tilings.get(shape, {}),
                "copy": number == 0,
                "meeting": str(meeting),
                "workers": len(pairs),
                "patience": arguments.patience,
            }
            command = [sys.executable, __file__, "--worker", json.dumps(job)]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        lines = []
        for process in processes:
            for line in process.communicate()[0].splitlines():
                lines.append(json.loads(line))
                print(line, flush=True)
    report(lines, arguments.output)


def report(lines: list[dict], output: pathlib.Path | None) -> None:
    """Prints a table of the entries and writes them."""
    run = next((line for line in lines if "card" in line), {})
    entries = [line for line in lines if "us" in line]
    rate = run.get("copy_GBs", 2800)
    print(f"{run}\n{'in x out':>14} {'rows':>5} {'bits':>4} {'µs':>8} {'floor':>7} {'GB/s':>6} {'of copy':>7}  error")
    for entry in entries:
        entry["floor_us"] = round(entry["bytes"] / rate / 1e3, 2)
        speed = entry["bytes"] / entry["us"] / 1e3
        print(
            f"{entry['in']:>6} x {entry['out']:>5} {entry['rows']:>5} {entry['bits']:>4} {entry['us']:>8} "
            f"{entry['floor_us']:>7} {speed:>6.0f} {speed / rate:>7.0%}  {entry['error']} {entry['tiling']} "
            f"{entry['origin']}"
        )
    if output:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**run, "date": date, "entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
