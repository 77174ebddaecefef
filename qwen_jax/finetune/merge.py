"""Folding an adapter into a float checkpoint."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters import orbax, peft, writer
from converters.huggingface import Module
from pallas_kernels.dense_matmul import DenseTensor
from qwen_jax import checkpoint_store
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json
from qwen_jax.read_progress import Progress, open_checkpoint


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging came to.

    Attributes:
        modules: projections that changed.
        saved: embeddings, heads and norms that were replaced.
        lost: the largest part of a projection's change that rounding to the checkpoint's dtype took away, as a ratio
            of norms.
        worst: that projection, by our path; None without any.
    """

    modules: int
    saved: int
    lost: float
    worst: str | None


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes a Hugging Face folder with W + scale · B · A in place of W, in the base's dtype.

    Args:
        model: a float Hugging Face folder or Hub id.
        adapter: a LoRA adapter's folder.
        out: the folder to write; it appears complete or not at all.
        overwrite: replace a folder that is there.
        progress: called with the bytes of the base read so far and their number.

    Raises:
        CheckpointError: the base is quantized (the message tells the two ways out) or converted; files that cannot be
            read; `out` is there.
    """
    folder = checkpoint_store.find(model)
    if orbax.is_checkpoint(folder):
        raise CheckpointError(
            f"{folder}: is a converted checkpoint, expected a float Hugging Face folder; merge into the folder that it "
            "was converted from (or export it first)."
        )
    checkpoint = open_checkpoint(folder, progress)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{folder}: is quantized ({checkpoint.quantization.where}), and an adapter cannot be folded into packed "
            "integers without quantizing them again; expected a float checkpoint. Either keep the adapter beside it "
            "(from_pretrained(…, adapter=…), --adapter), or merge into the float model it was made of and then run "
            "`qwen-jax quantize`."
        )
    read = peft.read(adapter, checkpoint.config)
    config = read_json(folder / "config.json")
    paths = list(checkpoint.paths)
    unties = checkpoint.config.tie_word_embeddings and {"embedding", "lm_head"} & set(read.saved)
    if unties:  # one of the two was trained: from now on they are two
        config["tie_word_embeddings"] = False
        paths.append("lm_head")
    lost: dict[str, float] = {}

    def parameters() -> Iterator[tuple[str, Any]]:
        for path in paths:
            if path.endswith(".scale"):
                base = checkpoint.read_vector(path)
                yield path, read.saved[path].astype(base.dtype) if path in read.saved else base
                continue
            module = checkpoint.read("embedding" if path == "lm_head" and unties else path)
            weight = module.weight
            assert isinstance(weight, DenseTensor)
            data = weight.data
            if path in read.saved:
                data = read.saved[path].astype(data.dtype)
            elif path in read.modules:
                data, lost[path] = _folded(data, read.modules[path])
            yield path, Module(dataclasses.replace(weight, data=data), module.bias)

    writer.write(out, parameters(), config=config, quantization=None, source=folder, overwrite=overwrite)
    worst = max(lost, key=lost.__getitem__, default=None)
    return MergeReport(len(lost), len(read.saved), lost[worst] if worst else 0.0, worst)


def _folded(data_OI: np.ndarray, term: peft.LowRank) -> tuple[np.ndarray, float]:
    change_OI = term.scale * (term.b_OR @ term.a_RI)
    wanted_OI = data_OI.astype(np.float32) + change_OI
    merged_OI = wanted_OI.astype(data_OI.dtype)
    norm = float(np.linalg.norm(change_OI))
    return merged_OI, float(np.linalg.norm(merged_OI.astype(np.float32) - wanted_OI)) / norm if norm else 0.0
