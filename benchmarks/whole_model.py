"""One model at true dimensions, with random weights made once: memory, prefill, and decode in every form.

    python benchmarks/whole_model.py --model qwen-7b --batch 1 8 32 --prefill --output seven.json

The same measurements as `qwen-jax bench memory`, `prefill` and `decode`, which make the weights anew for each. Programs
are compiled from shapes before the weights are made. Writes a list of results as `qwen-jax bench --output` writes one.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".93")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402

from qwen_jax import compilation_cache  # noqa: E402
from qwen_jax.bench import decode, floors, memory, prefill, processes, timing  # noqa: E402
from qwen_jax.bench.environment import environment  # noqa: E402


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def attempt(case: dict[str, Any], run) -> dict[str, Any]:
    """What `run` measures, or that it failed; the other cases still run."""
    begin = time.perf_counter()
    try:
        record = run()
    except Exception as error:
        record = case | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    say(f"{case} {time.perf_counter() - begin:.1f} s {record.get('failed', '')}")
    return record


def measure(options, job: dict[str, Any], runs, compiled: dict[str, Any]) -> tuple[dict[str, list], int]:
    """(records by kind, layers)."""
    say("making weights")
    decoder = memory.build(job)
    sizes = {key: job[key] for key in ("bits", "kv_bits", "context")}
    records: dict[str, list] = {"memory": [], "prefill": [], "decode": []}
    if jax.local_devices()[0].memory_stats():
        records["memory"].append(attempt(job, lambda: memory.counted(job, decoder=decoder)))
        if "peak_bytes" in compiled:
            records["memory"][0]["compiled_bytes"] = compiled["peak_bytes"]
    else:
        records["memory"].append(compiled)
    case = dict(batch=1, rounds=options.rounds) | sizes
    if options.prefill:
        run = functools.partial(prefill.measure, options.model, decoder, **case)
        records["prefill"].append(attempt({"model": options.model} | sizes, lambda: dataclasses.asdict(run())))
    for rows, one in runs:
        decoder.one_launch = one
        case["batch"] = rows
        named = {"model": options.model, "batch": rows, "form": decode.ONE if one else decode.EACH} | sizes
        run = functools.partial(decode.measure, options.model, decoder, **case)
        records["decode"].append(attempt(named, lambda run=run: dataclasses.asdict(run())))
    return records, decoder.config.num_layers


def main() -> None:
    """Compiles, waits for the device, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--batch", type=int, nargs="*", default=[1], help="rows of decode")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--kv-bits", type=int, default=8)
    parser.add_argument("--lm-head", choices=("int8",), help="a head of 8 bits")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument(
        "--forms", nargs="*", choices=("each", "one"), default=("each", "one"), help="of decode, batch 1"
    )
    parser.add_argument("--patience", type=float, default=240, help="seconds to wait for the device")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    compilation_cache.enable(pathlib.Path(tempfile.mkdtemp(prefix="compiled-")))
    sizes = dict(bits=options.bits, kv_bits=options.kv_bits, context=options.context)
    job = dict(model=options.model, batch=1, layers=options.layers, dtype=options.dtype, kernels="auto") | sizes
    job |= {"one_launch": "one" in options.forms, "lm_head": options.lm_head}
    forms = {"each": False, "one": True}
    runs = [(rows, forms[form]) for rows in options.batch for form in (options.forms if rows <= 8 else ["each"])]
    shapes = jax.eval_shape(lambda: memory.build(job))
    compiled = attempt(job | {"compiling": "memory"}, lambda: memory.compiled(job))
    for rows, one in runs:
        shapes.one_launch = one
        case = dict(kv_bits=options.kv_bits, batch=rows, context=options.context, rounds=options.rounds)
        attempt({"compiling": "decode", "rows": rows, "one": one}, lambda: decode.compile_ahead(shapes, **case) or {})  # noqa: B023
    with processes.Turn(patience=options.patience):
        records, layers = measure(options, job, runs, compiled)
        copy = timing.copy_bandwidth() / 1e9  # when the model is gone
    facts = environment(" ".join(["python", "benchmarks/whole_model.py", *sys.argv[1:]]))
    for kind, found in records.items():
        for record in found:
            record |= {"layers": layers} | ({} if options.lm_head is None else {"lm_head": options.lm_head})
            floors.add(kind, record, copy)
    sets = [
        {"kind": kind, "environment": facts, "copy_gigabytes_per_second": copy, "results": found}
        for kind, found in records.items()
        if found
    ]
    options.output.write_text(json.dumps(sets, indent=1) + "\n")


if __name__ == "__main__":
    main()
