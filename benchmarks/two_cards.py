"""Decode and prefill of true dimensions on one card and on two of the same machine, in one process: ratios.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.93 python benchmarks/two_cards.py --output result.json

Weights are random, made on the cards, the same numbers on one as on two, so that greedy tokens can be compared. A form
of a decode step is "each" (a kernel at a time), "psum" (the same, but sums over the cards are XLA's instead of our
own), "one" (all layers in one launch), or "alone": one launch without its sums over the cards, to tell their time. All
programs compile in threads before anything is timed. The work is done by a process of its own, which is killed when it
says nothing for too long (a collective that hangs): rows are printed and written as they are measured, so that the
others are kept. With `--processes 2` each card belongs to a process of its own.
"""

import argparse
import concurrent.futures
import contextvars
import dataclasses
import functools
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_step
from qwen_jax.bench import device_weights, split
from qwen_jax.bench.decode import _noise, programs_of
from qwen_jax.bench.environment import environment
from qwen_jax.bench.models import MODELS
from qwen_jax.generation import Loop, Rules
from qwen_jax.plan.abstract import Storage
from qwen_jax.sampling import SamplingConfig, device_sampler
from qwen_jax.sharding import MODEL, parse_mesh

STEPS, CHUNKS, ROUNDS = 16, 3, 3
COORDINATOR = "localhost:8476"
ROWS = """
qwen-72b 4 decode 1 1x2 one
qwen-72b 4 decode 1 1x1 one
qwen-7b 4 decode 1 1x2 one
qwen-7b 4 decode 1 1x1 one
qwen-72b 4 prefill 1 1x2 each
qwen-72b 4 prefill 1 1x1 each
qwen2.5-72b 4 decode 32 1x2 each
qwen2.5-72b 4 decode 32 1x2 psum
qwen2.5-72b 4 decode 32 1x1 each
qwen-72b 4 decode 1 1x2 each
qwen-72b 4 decode 1 1x2 alone
qwen-7b 4 decode 1 1x2 alone
qwen-7b 4 decode 8 1x2 one
qwen-7b 4 decode 8 1x1 one
qwen-72b 4 decode 8 1x2 one
qwen-72b 4 decode 8 1x1 one
qwen-7b 4 decode 32 1x2 each
qwen-7b 4 decode 32 1x2 psum
qwen-7b 4 decode 32 1x1 each
qwen-14b 4 decode 1 1x2 one
qwen-14b 4 decode 1 1x1 one
qwen-14b 4 decode 32 1x2 each
qwen-14b 4 decode 32 1x1 each
qwen-72b 8 decode 1 1x2 one
qwen-72b 8 decode 8 1x2 one
"""  # the cache of qwen-72b, batch 32, is larger than a card: qwen2.5-72b stands there


# Fields of the one launch's plan while a program is traced.
plan_options: contextvars.ContextVar[dict | None] = contextvars.ContextVar("plan_options", default=None)
_run = decode_step.run
decode_step.run = lambda *args, **named: _run(*args, **named, plan_options=plan_options.get())


@dataclasses.dataclass
class Model:
    """One model on one mesh in one form: its programs, at first without arrays."""

    name: str
    bits: int
    mesh: jax.sharding.Mesh | None
    form: str
    pieces: int = 2

    def __post_init__(self):
        options = dict(unroll=jax.default_backend() == "gpu", one_launch=not self.kernel_at_a_time)
        options |= dict(direct=self.form != "psum")
        decoder = device_weights.shapes(self.config, self.storage, self.mesh, **options)
        self.programs = programs_of(decoder, self.mesh)
        self.shapes, self.programs._leaves = self.programs._leaves, None

    @property
    def kernel_at_a_time(self) -> bool:
        return self.form in ("each", "psum")

    @property
    def config(self):
        return MODELS[self.name]

    @property
    def storage(self):
        return Storage(bits=self.bits, scales="bfloat16")

    def maker(self):
        """What makes the arrays, compiled."""
        pieces = self.pieces if self.mesh is None else self.mesh.shape[MODEL]
        return device_weights.maker(self.config, self.storage, self.mesh, pieces).lower().compile()

    def rows(self, array) -> jax.Array:
        """An array of the batch where the programs want it."""
        return jnp.asarray(array) if self.mesh is None else self.programs._rows(array)


class Decode:
    """Greedy decoding of `STEPS` tokens a dispatch over the 8-bit cache."""

    def __init__(self, model: Model, batch: int, context: int):
        self.model, self.batch, self.context = model, batch, context
        self.room = context + 2 * 128
        self.sampler = model.programs._place(device_sampler(SamplingConfig(), np.zeros(batch))[0], None)[0]
        self.filters = device_sampler(SamplingConfig(), np.zeros(batch))[1]
        self.rules = Rules(np.asarray([-1], np.int32), np.int32(0))

    def loop(self, length: int, noisy: bool, room: int | None = None) -> Loop:
        """A loop that starts at `length`."""
        model, rows = self.model, self.model.rows
        cache = model.programs.empty_cache(self.batch, room or self.room, "bfloat16", True)
        kv = _noise(cache.kv, model.mesh) if noisy else cache.kv
        cache = dataclasses.replace(cache, kv=kv, lengths_B=rows(np.full(self.batch, length, np.int32)))
        values = (np.int32(1), False, np.int32(0), np.int32(-1))
        token_B, done_B, count_B, nonfinite_B = (rows(np.full(self.batch, value)) for value in values)
        return Loop(cache, token_B, done_B, count_B, None, nonfinite_B)

    def compile(self) -> None:
        """Compiles the chunk."""
        chunk, static = self.model.programs._chunk, ()
        if isinstance(chunk, functools.partial):
            chunk, static = chunk.func, chunk.args
        abstract = shapes(functools.partial(self.loop, 0, False), self.loop(0, False, 1))
        run = dict(filters=self.filters, logprobs=False, steps=STEPS, active_length=self.room)
        arguments = (*static, self.model.shapes, self.sampler, self.rules)
        plan_options.set({"skip": ("cards",)} if self.model.form == "alone" else None)
        self.compiled = chunk.lower(*arguments, loop=abstract, **run).compile()

    def measure(self, leaves) -> dict:
        """tokens a second and milliseconds a step, medians; and the first tokens from an empty cache."""
        run = functools.partial(self.compiled, leaves, self.sampler, self.rules)
        loop, out = run(loop=self.loop(0, False))
        tokens = np.asarray(out.tokens_BN)[0].tolist()
        del loop
        loop, seconds = self.loop(self.context - STEPS, True), []
        for _ in range(ROUNDS + 1):  # as `generation` does: a chunk is given before the one before is over
            start = time.perf_counter()
            for _ in range(CHUNKS):
                loop, _ = run(loop=loop)
            jax.block_until_ready(loop)
            seconds.append((time.perf_counter() - start) / STEPS / CHUNKS)
        step = statistics.median(seconds[1:])
        row = {"step_ms": round(step * 1e3, 3), "tokens_per_second": round(self.batch / step, 1), "tokens": tokens}
        if self.model.kernel_at_a_time:
            busy = split.kernels(lambda: run(loop=loop))
            row |= split.of_step(busy, STEPS)
            most = sorted(busy, key=lambda name: -busy[name])[:20]
            row["kernels_ms"] = {name: round(busy[name] / STEPS, 4) for name in most}
        return row


class Prefill:
    """Reading `batch` prompts of `context` tokens into an 8-bit cache."""

    def __init__(self, model: Model, batch: int, context: int):
        self.model = model
        self.ids = model.rows(np.random.default_rng(0).integers(0, 1000, (batch, context)).astype(np.int32))
        self.lengths = model.rows(np.full(batch, context, np.int32))

    def cache(self, room: int | None = None):
        """An empty one."""
        return self.model.programs.empty_cache(len(self.ids), room or self.ids.shape[1], "bfloat16", True)

    def compile(self) -> None:
        """Compiles it."""
        read, static = self.model.programs._prefill, ()
        if isinstance(read, functools.partial):
            read, static = read.func, read.args
        abstract = shapes(self.cache, self.cache(1))
        self.compiled = read.lower(*static, self.model.shapes, self.ids, self.lengths, cache=abstract).compile()

    def measure(self, leaves) -> dict:
        """Milliseconds, median."""
        seconds = []
        for _ in range(4):
            cache = jax.block_until_ready(self.cache())
            start = time.perf_counter()
            jax.block_until_ready(self.compiled(leaves, self.ids, self.lengths, cache=cache))
            seconds.append(time.perf_counter() - start)
        return {"milliseconds": round(statistics.median(seconds[1:]) * 1e3, 2)}


def shapes(make, like):
    """Shapes of what `make` gives, without its memory, lying as the arrays of `like` do."""
    return jax.tree.map(
        lambda leaf, small: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=small.sharding),
        jax.eval_shape(make),
        like,
    )


def table(rows: list[dict]) -> str:
    """One line for each form on two cards, against the best form on one."""
    heads = [
        "model",
        "bits",
        "what",
        "batch",
        "one card ms",
        "two cards ms",
        "form",
        "times",
        "reductions ms",
        "tokens",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    cases = list(dict.fromkeys(tuple(row[key] for key in ("model", "bits", "what", "batch")) for row in rows))
    for case in cases:
        mine = [row for row in rows if tuple(row[key] for key in ("model", "bits", "what", "batch")) == case]
        done = [row for row in mine if row["mesh"] == "1x1" and _time(row)]
        one = min(done, key=_time) if done else {}
        for two in [row for row in mine if row["mesh"] != "1x1"] or [{}]:
            times = _time(one), _time(two)
            shown = [f"{value:.2f}" if value else "-" for value in times]
            ratio = f"{times[0] / times[1]:.2f}" if all(times) else "-"
            same = "-"
            if "tokens" in one and "tokens" in two and two["form"] != "alone":
                pairs = zip(one["tokens"], two["tokens"], strict=True)
                differ = [n for n, pair in enumerate(pairs) if len(set(pair)) > 1]
                same = f"differ from {differ[0]} on" if differ else "equal"
            cells = [*case, *shown, two.get("form", "-"), ratio, str(two.get("reductions_ms", "-")), same]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: dict) -> float | None:
    return row.get("step_ms", row.get("milliseconds"))


def watch(command: list[str], silence: float, limit: float, processes: int) -> int:
    """Runs a command and prints its lines; ends it after `limit` seconds, or `silence` without a line.

    Of several processes, which get `--process I`, the first one's lines.
    """
    others = [subprocess.Popen([*command, "--process", str(n)], stdout=subprocess.DEVNULL) for n in range(1, processes)]
    process = subprocess.Popen([*command, "--process", "0"], stdout=subprocess.PIPE, text=True)
    lines: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    until = time.monotonic() + limit
    while True:
        try:
            line = lines.get(timeout=max(min(silence, until - time.monotonic()), 0))
        except queue.Empty:
            for each in (process, *others):
                each.kill()
                each.wait()
            print(f"killed: silent for {silence:.0f} s, or not over after {limit:.0f} s", flush=True)
            return 1
        if line is None:
            return max(each.wait() for each in (process, *others))
        print(line, end="", flush=True)


def main() -> None:
    """Compiles and measures the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="file of rows: model bits decode|prefill batch mesh form", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--pieces", type=int, default=2, help='one card has the numbers of a mesh with so many on "model"'
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="no row begins after so many")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=float, default=240, help="seconds after which all is ended")
    parser.add_argument("--silence", type=float, default=120, help="seconds without a row after which all is ended")
    parser.add_argument("--processes", type=int, default=1, help="that own the cards")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is None:
        code = watch([sys.executable, *sys.argv], arguments.silence, arguments.limit, arguments.processes)
        if arguments.output and arguments.output.exists():
            print(table(json.loads(arguments.output.read_text())["rows"]), flush=True)
        sys.exit(code)
    if arguments.processes > 1:
        jax.distributed.initialize(COORDINATOR, arguments.processes, arguments.process, [arguments.process])
    began = time.perf_counter()
    lines = [line.split() for line in (arguments.rows.read_text() if arguments.rows else ROWS).split("\n") if line]
    meshes = {"1x1": None} | {name: parse_mesh(name) for name in {line[4] for line in lines} - {"1x1"}}
    keys = list(dict.fromkeys((line[0], int(line[1]), line[4], line[5]) for line in lines))
    models = {key: Model(key[0], key[1], meshes[key[2]], key[3], arguments.pieces) for key in keys}
    works = []
    facts = {"environment": environment() | {"command": " ".join(["python", *sys.argv[:-2]])}, "rows": []}
    # Several processes compile in one order: XLA tunes their programs together.
    with concurrent.futures.ThreadPoolExecutor(16 if arguments.processes == 1 else 1) as pool:
        makers = {key[:3]: model.maker for key, model in models.items()}
        makers = {key: pool.submit(maker) for key, maker in makers.items()}

        def prepare(line):
            model = models[line[0], int(line[1]), line[4], line[5]]
            work = {"decode": Decode, "prefill": Prefill}[line[2]](model, int(line[3]), arguments.context)
            work.compile()
            return work

        works = [(line, pool.submit(prepare, line)) for line in lines]
        held, leaves = None, None
        for line, work in works:
            concurrent.futures.wait([work])
            print(f"{' '.join(line)}: compiled, {time.perf_counter() - began:.0f} s", flush=True)
        for line, future in works:
            row = dict(zip(("model", "bits", "what", "batch", "mesh", "form"), line, strict=True))
            if time.perf_counter() - began > arguments.seconds:
                print(f"no time for {row}", flush=True)
                continue
            try:
                work, key = future.result(), (line[0], int(line[1]), line[4])
                if held != key:
                    leaves = None
                    held, leaves = key, jax.block_until_ready(makers[key].result()())
                row |= work.measure(leaves)
            except Exception as error:  # a row that cannot run is reported, and the others still run
                row["failed"] = repr(error)[:400]
                held, leaves = None, None
            row["at_second"] = round(time.perf_counter() - began)
            facts["rows"].append(row)
            print(json.dumps(row), flush=True)
            if arguments.output and arguments.process == 0:
                arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
