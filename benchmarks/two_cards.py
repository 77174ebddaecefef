"""Decode and prefill of true dimensions on one card and on two of the same machine, in one process: ratios.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.93 python benchmarks/two_cards.py --output result.json

Weights are random: two layers made on the host, repeated on the device to the model's depth, the same numbers on one
card and on two, so that greedy tokens can be compared. All programs compile in threads before anything is timed; rows
are printed as they are measured, so that a run that is cut short keeps what it had.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from converters.huggingface import Module
from pallas_kernels.dense_matmul import DenseTensor
from qwen_jax.bench.decode import _noise, programs_of
from qwen_jax.bench.environment import environment
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_checkpoint import RandomCheckpoint
from qwen_jax.generation import Loop, Rules
from qwen_jax.loading import CheckpointWeights
from qwen_jax.model import Decoder
from qwen_jax.sampling import SamplingConfig, device_sampler
from qwen_jax.sharded_weights import ShardedWeights
from qwen_jax.sharding import parse_mesh

HOST_LAYERS = 2  # made on the host, then repeated
STEPS, ROUNDS = 16, 4
ROWS = """
qwen-72b 4 decode 1 1x2
qwen-72b 4 decode 1 1x1
qwen-7b 4 decode 1 1x2
qwen-7b 4 decode 1 1x1
qwen-7b 4 decode 32 1x1
qwen-7b 4 decode 32 1x2
qwen-14b 4 decode 32 1x1
qwen-72b 4 prefill 1 1x2
qwen-72b 4 prefill 1 1x1
qwen-14b 4 decode 32 1x2
qwen-14b 4 decode 1 1x2
qwen-14b 4 decode 1 1x1
qwen-7b 4 decode 8 1x2
qwen-7b 4 decode 8 1x1
qwen-72b 8 decode 1 1x2
"""


class Tables(RandomCheckpoint):
    """Token tables whose rows repeat: whole ones take the host seconds."""

    def read(self, path: str) -> Module:
        """See `Checkpoint.read`."""
        if path not in ("embedding", "lm_head"):
            return super().read(path)
        spec = self.spec(path)
        part = self._rng(path).standard_normal((4096, spec.in_features), np.float32) / np.sqrt(spec.in_features)
        repeats = -(-spec.out_features // 4096)
        data_OI = np.tile(part.astype(self.dtype), (repeats, 1))[: spec.out_features]
        return Module(DenseTensor(data_OI, self.dtype, spec.in_features, "transposed"), None)


@dataclasses.dataclass
class Model:
    """One model on one mesh: its programs, and its leaves at the depth of `HOST_LAYERS`."""

    name: str
    bits: int
    mesh: jax.sharding.Mesh | None

    def build(self) -> None:
        """Makes the shallow leaves, and programs that believe in all layers."""
        config = MODELS[self.name]
        shallow = dataclasses.replace(config, num_layers=HOST_LAYERS, sliding_layers=(False,) * HOST_LAYERS)
        checkpoint = Tables(shallow, bits=self.bits)
        if self.mesh is None:
            weights = CheckpointWeights(checkpoint, dtype="bfloat16")
        else:
            weights = ShardedWeights(checkpoint, self.mesh, dtype="bfloat16")
        decoder = Decoder(weights.config, weights, dtype="bfloat16", unroll=jax.default_backend() == "gpu")
        layers = config.num_layers
        decoder.config = dataclasses.replace(decoder.config, num_layers=layers, sliding_layers=(False,) * layers)
        [block] = decoder.blocks
        block.count = layers
        self.programs = programs_of(decoder, self.mesh)
        self.shallow, self.repeats = self.programs._leaves, layers // HOST_LAYERS

    def abstract(self) -> list[jax.ShapeDtypeStruct]:
        """The leaves at full depth, without memory."""
        return [
            jax.ShapeDtypeStruct((self._depth(leaf), *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
            for leaf in self.shallow
        ]

    def deepen(self) -> list[jax.Array]:
        """The leaves at full depth."""
        return [leaf if self._depth(leaf) == leaf.shape[0] else self._repeat(leaf) for leaf in self.shallow]

    def _depth(self, leaf) -> int:
        return leaf.shape[0] * (self.repeats if leaf.shape[0] == HOST_LAYERS else 1)

    def _repeat(self, leaf):
        tile = functools.partial(jnp.tile, reps=(self.repeats, *[1] * (leaf.ndim - 1)))
        return jax.jit(tile, out_shardings=leaf.sharding)(leaf)

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

    def loop(self, length: int, noisy: bool) -> Loop:
        """A loop that starts at `length`."""
        model, rows = self.model, self.model.rows
        cache = model.programs.empty_cache(self.batch, self.room, "bfloat16", True)
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
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.loop(0, False)
        )
        run = dict(filters=self.filters, logprobs=False, steps=STEPS, active_length=self.room)
        arguments = (*static, self.model.abstract(), self.sampler, self.rules)
        self.compiled = chunk.lower(*arguments, loop=abstract, **run).compile()

    def measure(self, leaves) -> dict:
        """tokens a second and milliseconds a step, medians; and the first tokens from an empty cache."""
        run = functools.partial(self.compiled, leaves, self.sampler, self.rules)
        loop, out = run(loop=self.loop(0, False))
        tokens = np.asarray(out.tokens_BN)[0].tolist()
        del loop
        loop, seconds = self.loop(self.context - STEPS, True), []
        for _ in range(ROUNDS + 2):
            jax.block_until_ready(loop)
            start = time.perf_counter()
            loop, _ = run(loop=loop)
            jax.block_until_ready(loop)
            seconds.append((time.perf_counter() - start) / STEPS)
        step = statistics.median(seconds[2:])
        return {"step_ms": round(step * 1e3, 3), "tokens_per_second": round(self.batch / step, 1), "tokens": tokens}


class Prefill:
    """Reading `batch` prompts of `context` tokens into an 8-bit cache."""

    def __init__(self, model: Model, batch: int, context: int):
        self.model = model
        self.ids = model.rows(np.random.default_rng(0).integers(0, 1000, (batch, context)).astype(np.int32))
        self.lengths = model.rows(np.full(batch, context, np.int32))

    def cache(self):
        """An empty one."""
        return self.model.programs.empty_cache(*self.ids.shape, "bfloat16", True)

    def compile(self) -> None:
        """Compiles it."""
        read, static = self.model.programs._prefill, ()
        if isinstance(read, functools.partial):
            read, static = read.func, read.args
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.cache()
        )
        self.compiled = read.lower(*static, self.model.abstract(), self.ids, self.lengths, cache=abstract).compile()

    def measure(self, leaves) -> dict:
        """Milliseconds, median."""
        seconds = []
        for _ in range(4):
            cache = jax.block_until_ready(self.cache())
            start = time.perf_counter()
            jax.block_until_ready(self.compiled(leaves, self.ids, self.lengths, cache=cache))
            seconds.append(time.perf_counter() - start)
        return {"milliseconds": round(statistics.median(seconds[1:]) * 1e3, 2)}


def main() -> None:
    """Compiles and measures the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="file of rows: model bits decode|prefill batch mesh", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1e9, help="no row begins after so many")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    lines = [line.split() for line in (arguments.rows.read_text() if arguments.rows else ROWS).split("\n") if line]
    meshes = {"1x1": None} | {name: parse_mesh(name) for name in {line[4] for line in lines} - {"1x1"}}
    keys = list(dict.fromkeys((line[0], int(line[1]), line[4]) for line in lines))
    models = {key: Model(key[0], key[1], meshes[key[2]]) for key in keys}
    works = []
    facts = {"environment": environment() | {"command": " ".join(["python", *sys.argv])}, "rows": []}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        built = {key: pool.submit(model.build) for key, model in models.items()}

        def prepare(line):
            key = line[0], int(line[1]), line[4]
            built[key].result()
            work = {"decode": Decode, "prefill": Prefill}[line[2]](models[key], int(line[3]), arguments.context)
            work.compile()
            return key, work

        works = [(line, pool.submit(prepare, line)) for line in lines]
        held, leaves = None, None
        for _, work in works:
            concurrent.futures.wait([work])
        print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
        for line, future in works:
            row = dict(zip(("model", "bits", "what", "batch", "mesh"), line, strict=True))
            if time.perf_counter() - began > arguments.seconds:
                print(f"no time for {row}", flush=True)
                continue
            try:
                key, work = future.result()
                if held != key:
                    leaves = None
                    held, leaves = key, jax.block_until_ready(models[key].deepen())
                row |= work.measure(leaves)
            except Exception as error:  # a row that cannot run is reported, and the others still run
                row["failed"] = repr(error)[:400]
                held, leaves = None, None
            row["at_second"] = round(time.perf_counter() - began)
            facts["rows"].append(row)
            print(json.dumps(row), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
