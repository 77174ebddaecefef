"""Quantizes SmolLM2-135M with given options and prints its perplexity: one JSON line.

    python benchmarks/quantize_smollm2.py --rows 128 --set sym=false --set propagation=0

Text: Python's own documentation; perplexity over its first 8192 tokens, one <|im_start|> in front, in windows of 1024;
calibration on rows of 512 out of its last 65,536 tokens (the text differs by Python version).
"""

import argparse
import json
import platform
import pydoc_data.topics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from qwen_jax import QwenForCausalLM
from qwen_jax.demo.smollm2 import smollm2_folder
from qwen_jax.evaluate import perplexity
from qwen_jax.quantize import QuantizeSettings, quantize
from qwen_jax.quantize.streams import BATCH_TOKENS

TOKENS, ROW = 8192, 512


def main() -> None:
    """Runs one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of 512 tokens, of 128")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a field of QuantizeSettings")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="changes the order of sums, no more")
    parser.add_argument("--kv8", action="store_true", help="also the perplexity through the 8-bit KV cache (slow)")
    arguments = parser.parse_args()
    settings = {"group_size": 64} | {
        name: json.loads(value) for name, _, value in (s.partition("=") for s in arguments.set)
    }
    source = smollm2_folder()
    ids = documentation_ids(source)
    rows = ids[-128 * ROW :].reshape(128, ROW)[:: 128 // arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "quantized"
        wall, cpu = time.perf_counter(), time.process_time()
        how = QuantizeSettings(**settings)
        reports = quantize(source, target, list(rows), how, dtype="float32", batch_tokens=arguments.batch_tokens)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        model = QwenForCausalLM.from_pretrained(target, dtype="float32")
        result = {
            "rows": len(rows),
            "settings": settings,
            "batch_tokens": arguments.batch_tokens,
            "perplexity": round(perplexity(model, ids, limit=TOKENS), 4),
            "mean_relative_error": float(np.mean([report.error for report in reports])),
            "wall_seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
        }
        if arguments.kv8:
            model = QwenForCausalLM.from_pretrained(
                target, dtype="float32", use_cache_quantization=True, max_length=1024
            )
            result["perplexity_8bit_cache"] = round(perplexity(model, ids, limit=TOKENS, through_cache=True), 4)
    print(json.dumps(result | {"python": platform.python_version(), "jax": jax.__version__}))


def documentation_ids(source: Path) -> np.ndarray:
    """The ids of the references in benchmarks/results/quantization_smollm2.md."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    # The references were made with transformers' reading of the GGUF file, which does not single out digits: 157 of
    # 122,012 tokens differ. The first 8192 are the same either way.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "\n".join(pydoc_data.topics.topics.values())
    start = tokenizer.token_to_id("<|im_start|>")
    return np.array([start, *tokenizer.encode(text, add_special_tokens=False).ids], np.int32)


if __name__ == "__main__":
    main()
