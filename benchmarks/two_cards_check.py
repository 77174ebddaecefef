"""Whether two cards say what one says, in all forms of a decode step: small models with the layers' true widths.

    timeout 200 python benchmarks/two_cards_check.py

Each form decodes the tokens of the reference (one card, a kernel at a time); shown are the relative error of logits
‖e‖ / ‖ref‖ and how often the greedy token is another. Then the one launch over two cards, and a kernel at a time with
our own sums, run thousands of times, twice, and must give the same tokens. The caller ends what hangs.
"""

import concurrent.futures
import dataclasses
import functools
import sys
import time

import jax
import numpy as np
from two_cards import Decode, Model, shapes

from qwen_jax.bench.models import MODELS
from qwen_jax.sharding import parse_mesh

LAYERS, VOCABULARY, ROOM, STEPS = 2, 8000, 128, 24
CASES = [
    ("qwen-7b", 4, 1),
    ("qwen2.5-7b", 4, 3),
    ("qwen-7b", 4, 8),
    ("qwen3-8b", 8, 2),
    ("qwen-14b", 4, 1),
    ("qwen-7b", 4, 32),
]
FORMS = [("1x1", "each"), ("1x1", "one"), ("1x2", "each"), ("1x2", "psum"), ("1x2", "one")]


class Step:
    """One token of all rows: logits and the cache."""

    def __init__(self, name: str, bits: int, batch: int, mesh_name: str, form: str):
        self.mesh = None if mesh_name == "1x1" else parse_mesh(mesh_name)
        self.model, self.batch = Model(name, bits, self.mesh, form), batch

    def cache(self, room: int = ROOM):
        """An empty one."""
        return self.model.programs.empty_cache(self.batch, room, "bfloat16", True)

    def compile(self) -> None:
        """Compiles it."""
        decode, static = self.model.programs._decode, ()
        if isinstance(decode, functools.partial):
            decode, static = decode.func, decode.args
        token_B = self.model.rows(np.zeros(self.batch, np.int32))
        abstract = shapes(self.cache, self.cache(16))
        lowered = decode.lower(*static, self.model.shapes, token_B, cache=abstract, active_length=ROOM)
        self.compiled = lowered.compile()

    def run(self, leaves, token_B, cache):
        """float64 logits [B, V], and the cache."""
        logits_BV, cache = self.compiled(leaves, self.model.rows(token_B), cache=cache)
        return np.asarray(logits_BV)[:, :VOCABULARY].astype(np.float64), cache


def check(case, steps, leaves) -> bool:
    """Prints a line a form."""
    reference, good = [], True
    for (mesh_name, form), future in steps.items():
        step, errors, other = future.result(), [], 0
        token_B, cache = np.arange(1, step.batch + 1, dtype=np.int32), step.cache()
        for number in range(STEPS):
            logits_BV, cache = step.run(leaves[mesh_name], token_B, cache)
            best_B = logits_BV.argmax(-1).astype(np.int32)
            if len(reference) == number:
                reference.append((logits_BV, best_B))
            want_BV, token_B = reference[number]
            errors.append(np.linalg.norm(logits_BV - want_BV) / np.linalg.norm(want_BV))
            other += int((best_B != token_B).sum())
        good &= max(errors) < 3e-2
        print(f"{case} {mesh_name} {form}: error {max(errors):.1e}, other tokens {other} of {step.batch * STEPS}",
              flush=True)  # fmt: skip
    return good


def repeat(work: Decode, leaves, chunks: int = 120) -> bool:
    """Whether thousands of steps give the same tokens twice."""
    found = []
    for _ in range(2):
        loop, tokens = work.loop(300, True), []
        for _ in range(chunks):
            loop, out = work.compiled(leaves, work.sampler, work.rules, loop=loop)
            tokens.append(np.asarray(out.tokens_BN))
        found.append(np.concatenate(tokens, axis=1))
    same = np.array_equal(*found)
    print(f"{found[0].shape[1]} steps on two cards ({work.model.form}): {'the same' if same else 'OTHER'} tokens, "
          f"{len(np.unique(found[0]))} kinds", flush=True)  # fmt: skip
    return same


def main() -> None:
    """Compiles all, then runs one after another."""
    began = time.perf_counter()
    for name, config in list(MODELS.items()):
        MODELS[name] = dataclasses.replace(
            config, num_layers=LAYERS, sliding_layers=(False,) * LAYERS, vocab_size=VOCABULARY
        )
    cases = CASES[: int(sys.argv[1])] if len(sys.argv) > 1 else CASES

    def prepare(work):
        work.compile()
        return work

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        steps = {case: {f: pool.submit(lambda c, f: prepare(Step(*c, *f)), case, f) for f in FORMS} for case in cases}
        two = [(Model("qwen-7b", 4, parse_mesh("1x2"), form), batch) for form, batch in (("one", 1), ("each", 32))]
        many = [pool.submit(prepare, Decode(model, batch, 2048)) for model, batch in two]
        makers = {
            (case[:2], mesh): pool.submit(Model(*case[:2], None if mesh == "1x1" else parse_mesh(mesh), "each").maker)
            for case in cases
            for mesh in ("1x1", "1x2")
        }
    print(f"compiled: {time.perf_counter() - began:.0f} s", flush=True)
    good = True
    for case in cases:
        leaves = {mesh: makers[case[:2], mesh].result()() for mesh in ("1x1", "1x2")}
        good &= check(case, steps[case], leaves)
        if case == cases[0]:
            good &= all([repeat(work.result(), leaves["1x2"]) for work in many])
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    jax.effects_barrier()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
