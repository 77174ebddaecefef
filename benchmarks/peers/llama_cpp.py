"""SmolLM2-135M on a CPU: qwen-jax (Int4 layers, 8-bit KV cache) and llama.cpp (the package's own GGUF file), in turn.

A shared machine's speed moves by a third from minute to minute. Each round therefore runs every engine once, one after
the other, and what counts is the median of the rounds' ratios. Both read the same random prompt and decode greedily;
llama.cpp through its C interface with an argmax in NumPy, the least it can cost; qwen-jax through `generate`.

    python benchmarks/peers/llama_cpp.py --rounds 7

Run it on an idle machine: llama.cpp's threads spin while they wait for each other, and with other programs on the same
cores it falls far more than qwen-jax does (156 tokens/s to 9, seen on two cores with a load of 8). The last line is
JSON. Needs the extras `demo` and `peers`.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import numpy as np

# A script's own folder comes first on the path, where this file would be taken for the package of the same name.
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry).resolve() != pathlib.Path(__file__).resolve().parent]

ROOM = 1024  # tokens a context holds


class LlamaCpp:
    """llama.cpp over the GGUF file; layers Q4_1, head Q8_0, KV cache float16."""

    def __init__(self, path: pathlib.Path, threads: int):
        import llama_cpp

        self.api = llama_cpp
        self.model = llama_cpp.Llama(
            str(path), n_ctx=ROOM, n_threads=threads, n_threads_batch=threads, n_batch=ROOM, n_ubatch=512, verbose=False
        )
        self.context = self.model.ctx
        self.vocabulary = self.model.n_vocab()

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        """Seconds for the prompt up to the first token's logits, and for `new` more tokens."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        token = self._evaluate(prompt)
        middle = time.perf_counter()
        for _ in range(new):
            token = self._evaluate([token])
        return middle - start, time.perf_counter() - middle

    def _evaluate(self, tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


class QwenJax:
    """qwen-jax over the demo's Int4 checkpoint with the 8-bit KV cache."""

    def __init__(self, folder: pathlib.Path, lm_head: str | None):
        from qwen_jax import QwenForCausalLM

        self.model = QwenForCausalLM.from_pretrained(
            folder, use_cache_quantization=True, max_length=ROOM, lm_head=lm_head
        )

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        """Seconds for the prompt and its first token, and for `new` more (the difference of two calls)."""
        first = self._generate(prompt, 1)
        return first, self._generate(prompt, 1 + new) - first

    def _generate(self, prompt: list[int], new: int) -> float:
        start = time.perf_counter()
        out = self.model.generate(np.array([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=[])
        if out.shape[1] != len(prompt) + new:
            raise RuntimeError(f"generate stopped early: {out.shape[1] - len(prompt)} tokens of {new}")
        return time.perf_counter() - start

    def kernels(self) -> dict[str, str]:
        """Which kernel and form each distinct matrix runs in while decoding."""
        import jax

        from pallas_kernels import dense_matmul, quantized_matmul

        x_MI = lambda weight: jax.ShapeDtypeStruct((1, weight.in_features), self.model.dtype)  # noqa: E731
        is_weight = lambda leaf: hasattr(leaf, "in_features")  # noqa: E731
        chip, found = jax.devices()[0].device_kind, {}
        for weight in jax.tree.leaves(self.model.decoder, is_leaf=is_weight):
            if isinstance(weight, quantized_matmul.QuantizedTensor):
                kind = f"{weight.bits} bits, groups of {weight.group_size}"
                found[kind] = str(quantized_matmul.choose(quantized_matmul.shape_of(x_MI(weight), weight), chip))
            elif isinstance(weight, dense_matmul.DenseTensor):
                found[weight.dtype] = str(dense_matmul.choose(weight, 1, chip))
        return found


def measure(engines: dict, rounds: int, prompt_length: int, new: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each engine in each round; one unmeasured round first compiles and warms up."""
    speeds = {name: {"prefill": [], "decode": []} for name in engines}
    generator = np.random.default_rng(0)
    for number in range(rounds + 1):
        prompt = [int(token) for token in generator.integers(100, 40000, prompt_length)]
        for name, engine in engines.items():
            prefill_s, decode_s = engine.run(prompt, new)
            time.sleep(0.3)  # threads that spin for work must be asleep before the next engine is timed
            if number:
                speeds[name]["prefill"].append(prompt_length / prefill_s)
                speeds[name]["decode"].append(new / decode_s)
    return speeds


def summary(values: list[float], peer: list[float]) -> dict[str, float]:
    """Median, extremes, and the median of the ratios to the peer in the same round."""
    ratios = [own / other for own, other in zip(values, peer, strict=True)]
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, 1) for key, value in figures.items()} | {"ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    """Prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens decoded after the first")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--heads", default="16-bit,int8", help="which of ours to run")
    arguments = parser.parse_args()

    from qwen_jax.compilation_cache import enable
    from qwen_jax.demo.checkpoints import demo_checkpoints
    from qwen_jax.demo.smollm2 import find_gguf

    enable()
    load = os.getloadavg()[0]
    if load > 0.5 * arguments.threads:
        print(f"Load average {load:.1f}: other programs are running, which slows llama.cpp more than qwen-jax.")
    folder = demo_checkpoints(lambda step, done, total: None).converted
    peer = "llama.cpp, head Q8_0"
    engines = {peer: LlamaCpp(find_gguf(), arguments.threads)}
    for head in arguments.heads.split(","):
        engines[f"qwen-jax, head {head}"] = QwenJax(folder, "int8" if head == "int8" else None)
    speeds = measure(engines, arguments.rounds, arguments.prompt, arguments.new)

    results = {
        name: {kind: summary(values, speeds[peer][kind]) for kind, values in kinds.items()}
        for name, kinds in speeds.items()
    }
    print(f"{'tokens/s: median (range)':26}{f'prefill of {arguments.prompt}':>22}{'x':>6}{'decode':>22}{'x':>6}")
    for name, kinds in results.items():
        row = f"{name:26}"
        for figures in kinds.values():
            row += f"{figures['median']:.1f} ({figures['min']:.0f}–{figures['max']:.0f})".rjust(22)
            row += f"{figures['ratio']:.2f}".rjust(6)
        print(row)
    kernels = {name: engine.kernels() for name, engine in engines.items() if isinstance(engine, QwenJax)}
    for name, found in kernels.items():
        print(f"{name}: " + "; ".join(f"{kind}: {choice}" for kind, choice in found.items()))
    print(
        json.dumps(
            {
                "results": results,
                "kernels": kernels,
                "rounds": arguments.rounds,
                "prompt": arguments.prompt,
                "new": arguments.new,
                "threads": arguments.threads,
                "load_average": load,
                "machine": platform.machine(),
                "versions": {
                    package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "llama-cpp-python")
                },
            }
        )
    )


if __name__ == "__main__":
    main()
