"""A fine-tuning run from beginning to end, or from where it was interrupted."""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from converters import peft
from qwen_jax import checkpoint_store
from qwen_jax.errors import CheckpointError
from qwen_jax.finetune import parameters
from qwen_jax.finetune.checkpoints import Checkpoints
from qwen_jax.finetune.data import Dataset, read_dataset
from qwen_jax.finetune.metrics import Recorder
from qwen_jax.finetune.programs import Metrics, TrainingPrograms
from qwen_jax.finetune.rows import Rows
from qwen_jax.finetune.settings import FinetuneSettings
from qwen_jax.model import Decoder
from qwen_jax.sharding import DATA, MODEL, SEQUENCE

logger = logging.getLogger("qwen_jax")

MARK, METRICS, PLOT, CHECKPOINTS = "finetune.json", "metrics.jsonl", "loss.png", "checkpoints"


@dataclasses.dataclass(frozen=True)
class FinetuneReport:
    """What a run came to.

    Attributes:
        steps: done in all.
        resumed_from: step that an interrupted run was taken up at; 0 for none.
        losses: of each step, a mean over its learned tokens.
        trained: numbers that were trained.
        examples: conversations learned from.
        cut: of these, how many were longer than a row and lost their end.
        cut_tokens: tokens they lost.
        dropped: conversations with nothing left to learn.
        padding: part of all rows' tokens that was padding.
        tokens_per_second: padding included, the median of the steps done now; None without any.
        plot: whether the loss was drawn.
    """

    steps: int
    resumed_from: int
    losses: list[float]
    trained: int
    examples: int
    cut: int
    cut_tokens: int
    dropped: int
    padding: float
    tokens_per_second: float | None
    plot: bool


def finetune(
    model: str | Path,
    data: str | Path | Dataset,
    out: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    kernels: str = "auto",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: Callable[[dict[str, Any], int], None] = lambda line, steps: None,
) -> FinetuneReport:
    """Trains low-rank terms (LoRA, arXiv:2106.09685) beside a model's frozen weights, float or packed.

    `out` gets the adapter in PEFT's files (adapter_config.json, adapter_model.safetensors), metrics.jsonl, loss.png and
    the training states of the last few checkpoints; the same call takes an interrupted run up again at the newest of
    them and comes to the same losses.

    Args:
        model: Hugging Face folder, converted folder, or Hub id; its weights are read and never changed.
        data: conversations in a .json or .jsonl file (see `data.read_dataset`), or a Dataset.
        out: the folder to write.
        settings: see `FinetuneSettings`.
        adapter: an adapter to go on from, whose rank, alpha and modules then count; None for a new one.
        dtype: of activations: "float32", "bfloat16", "float16" or "auto".
        kernels: as in `from_pretrained`.
        mesh: as in `from_pretrained`: "data" divides rows, "model" the weights.
        overwrite: begin anew where `out` was made with other settings or data.
        resume: take up what is there; else begin anew.
        progress: called after each step with its line of metrics.jsonl and the number of steps.

    Raises:
        CheckpointError: the model or adapter cannot be read; `out` holds something else.
        ValueError: bad settings or data, naming file and line.
        FloatingPointError: the loss is not finite.
    """
    from qwen_jax.causal_lm import default_dtype  # late: it loads the whole model code

    if mesh is not None and SEQUENCE in mesh.axis_names:
        raise ValueError(
            f"mesh: axes {tuple(mesh.axis_names)}, expected {DATA!r} and {MODEL!r}: {SEQUENCE!r} splits a cache, which "
            "training has not. Give its devices to one of those."
        )
    settings = FinetuneSettings() if settings is None else settings
    folder, out = checkpoint_store.find(model), Path(out).absolute()
    if dtype == "auto":
        dtype = default_dtype(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    dataset = data if isinstance(data, Dataset) else _read(folder, data, settings.length)
    if dataset.cut or dataset.dropped:
        logger.info(
            "%d of %d conversations were longer than %d tokens and lost %d; %d had nothing left to learn.",
            dataset.cut,
            len(dataset.examples) + dataset.dropped,
            settings.length,
            dataset.cut_tokens,
            dataset.dropped,
        )
    weights = checkpoint_store.open_weights(folder, dtype=dtype, kernels=kernels, mesh=mesh)
    config = getattr(weights, "whole_config", weights.config)
    _check(config, dataset, settings, mesh)
    rows = Rows(
        dataset,
        length=settings.length,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        packing=settings.packing,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    _prepare(out, _mark(folder, dataset, settings, adapter, dtype), overwrite, resume)
    decoder = Decoder(weights.config, weights, dtype=dtype, kernels=kernels)
    if adapter is None:
        template = parameters.initial(config, decoder, weights, settings)
    else:
        template = peft.read(adapter, config)
    tree, scales = parameters.from_adapter(template, decoder)
    trained = parameters.size(tree)
    programs = TrainingPrograms(decoder, weights, tree, scales, settings, rows.steps)
    state = programs.start(tree)
    checkpoints = Checkpoints(out / CHECKPOINTS, settings.keep)
    try:
        state = checkpoints.restore(state) or state
        first = int(state.step)
        recorder = Recorder(out / METRICS, first, math.prod(rows.batch(0).ids.shape))
        for step in range(first, rows.steps):
            batch = rows.batch(step)
            recorder.tokens = batch.ids.size
            state, metrics = programs.step(state, batch)
            progress(recorder.add(step + 1, _finite(metrics, step + 1)), rows.steps)
            if (step + 1) % settings.save_every == 0 or step + 1 == rows.steps:
                checkpoints.save(state)
    finally:
        checkpoints.close()
    trained_adapter = parameters.to_adapter(state.parameters, template, decoder)
    _write(out, trained_adapter, template, config, str(model), settings)
    rates = sorted(line["tokens_per_second"] for line in recorder.lines[first:])
    return FinetuneReport(
        steps=rows.steps,
        resumed_from=first,
        losses=[line["loss"] for line in recorder.lines],
        trained=trained,
        examples=len(dataset.examples),
        cut=dataset.cut,
        cut_tokens=dataset.cut_tokens,
        dropped=dataset.dropped,
        padding=rows.padding,
        tokens_per_second=rates[len(rates) // 2] if rates else None,
        plot=recorder.plot(out / PLOT),
    )


def _read(folder: Path, data: str | Path, length: int) -> Dataset:
    from qwen_jax.tokenizer import AutoTokenizer

    return read_dataset(data, AutoTokenizer.from_pretrained(str(folder)), length)


def _check(config, dataset: Dataset, settings: FinetuneSettings, mesh: Mesh | None) -> None:
    longest = (
        config.seq_length if config.use_dynamic_ntk or config.use_logn_attention else config.max_position_embeddings
    )
    if settings.length > longest:
        raise ValueError(f"length={settings.length}: expected at most the model's {longest} tokens.")
    highest = max(int(example.ids_T.max()) for example in dataset.examples)
    if highest >= config.vocab_size:
        raise ValueError(
            f"data: holds token id {highest}, expected ids below {config.vocab_size}; the tokenizer is another model's."
        )
    longest = max(len(example.ids_T) for example in dataset.examples)
    if longest > settings.length:
        raise ValueError(f"data: an example has {longest} tokens, rows have {settings.length}; cut it (see `collect`).")
    if mesh is not None and settings.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size={settings.batch_size}: expected a multiple of the {mesh.shape['data']} devices on 'data'."
        )


def _mark(folder: Path, dataset: Dataset, settings: FinetuneSettings, adapter, dtype: str) -> dict[str, Any]:
    """What the result depends on, but for the model's weights, of which names, sizes and dates stand in."""
    files = [f"{file.name} {file.stat().st_size}" for file in sorted(folder.glob("*")) if file.is_file()]
    start = None
    if adapter is not None:
        path = Path(adapter) / peft.WEIGHTS
        start = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(adapter)
    free = ("save_every", "keep")  # may change from one part of a run to the next
    kept = {name: value for name, value in settings.json().items() if name not in free}
    return {
        "settings": kept,
        "data": dataset.digest(),
        "model": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        "adapter": start,
        "dtype": dtype,
    }


def _prepare(out: Path, mark: dict[str, Any], overwrite: bool, resume: bool) -> None:
    """Makes `out`, or finds in it the same run begun earlier; anything else there is refused or, if asked, removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        file = out / MARK
        old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        changed = [key for key in mark if old is not None and old.get(key) != mark[key]]
        if old is not None and not changed and resume:
            return
        if not overwrite and (old is None or changed):
            found = f"a run with other {' and '.join(changed)}" if old is not None else "something else"
            raise CheckpointError(f"{out}: holds {found}; remove it, ask to overwrite it, or write elsewhere.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def _finite(metrics: Metrics, step: int) -> Metrics:
    metrics = jax.device_get(metrics)
    if not math.isfinite(metrics.loss) or not math.isfinite(metrics.gradient_norm):
        raise FloatingPointError(
            f"step {step}: loss {metrics.loss}, norm of the gradient {metrics.gradient_norm}; expected finite numbers. "
            "Lower the learning rate, or use bfloat16 instead of float16."
        )
    return metrics


def _write(out: Path, adapter, template, config, base_model: str, settings: FinetuneSettings) -> None:
    old = template.settings
    peft.write_files(
        out,
        adapter,
        config,
        base_model=base_model,
        targets=list(old.get("target_modules") or []) if old else settings.targets(config),
        rank=old["r"] if old else settings.rank,
        alpha=old["lora_alpha"] if old else settings.alpha,
        dropout=settings.dropout,
        rslora=bool(old.get("use_rslora")) if old else settings.rslora,
        rank_pattern=old.get("rank_pattern"),
        alpha_pattern=old.get("alpha_pattern"),
        selection=old,
    )
