"""`qwen-jax finetune`: LoRA on a float or quantized model."""

import pathlib
from typing import Annotated

import typer

from . import common
from .common import Debug, Json, print_json

EXAMPLES = """
qwen-jax finetune Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4 conversations.json ./adapter --rank 64 --length 2048
qwen-jax finetune ./model data.jsonl ./adapter --target-modules q_proj,v_proj --modules-to-save lm_head
qwen-jax generate ./model "Once upon a time" --adapter ./adapter
"""


def run(
    model: common.Model,
    data: Annotated[pathlib.Path, typer.Argument(help="Conversations, .json or .jsonl.", metavar="DATA")],
    out: Annotated[pathlib.Path, typer.Argument(help="The folder to write the adapter to.", metavar="OUT")],
    rank: Annotated[int, typer.Option(help="Of the low-rank terms.")] = 16,
    alpha: Annotated[float, typer.Option(help="The terms' scale is alpha / rank.")] = 32.0,
    dropout: Annotated[float, typer.Option(help="Part of a term's inputs that is dropped while training.")] = 0.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale alpha / √rank instead.")] = False,
    target_modules: Annotated[
        str, typer.Option(help="Projections that learn, with commas; all by default.", metavar="NAMES")
    ] = "",
    modules_to_save: Annotated[
        str, typer.Option(help="Embedding, head, norms to train whole, with commas.", metavar="NAMES")
    ] = "",
    adapter: Annotated[pathlib.Path | None, typer.Option(help="An adapter to go on from.", metavar="FOLDER")] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant, after the warm-up.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Steps of rise; below 1 a part of all.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    beta1: Annotated[float, typer.Option(help="AdamW's.")] = 0.9,
    beta2: Annotated[float, typer.Option(help="AdamW's.")] = 0.999,
    epsilon: Annotated[float, typer.Option(help="AdamW's.")] = 1e-8,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Fewer steps than the epochs would take.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a step and accumulation.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens a row; longer conversations are cut.")] = 1024,
    packing: Annotated[
        bool, typer.Option("--packing/--padding", help="Several conversations a row, kept apart, or one.")
    ] = True,
    remat: Annotated[bool, typer.Option("--remat/--no-remat", help="Less memory, a third more arithmetic.")] = True,
    data_devices: Annotated[int, typer.Option(help="Devices that share the rows.", min=1)] = 1,
    model_devices: Annotated[int, typer.Option(help="Devices that share the weights.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of first values, order of the data, and dropout.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints kept.")] = 3,
    dtype: common.Dtype = "auto",
    kernels: common.Kernels = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in OUT.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on where the same run was interrupted.")
    ] = True,
    json: Json = False,
    debug: Debug = False,
):
    """Train a LoRA adapter on conversations; the weights stay as they are, 4-bit ones packed."""
    import dataclasses

    from .. import compilation_cache
    from ..finetune import FinetuneSettings, finetune

    compilation_cache.enable()
    settings = FinetuneSettings(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        target_modules=_names(target_modules),
        modules_to_save=_names(modules_to_save),
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        clip=clip,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulate=accumulate,
        length=length,
        packing=packing,
        remat=remat,
        seed=seed,
        save_every=save_every,
        keep=keep,
    )
    with common.progress_bars(announce=not json) as update:

        def progress(line, steps):
            note = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
            update("Fine-tuning", line["step"], steps, unit="steps", note=note)

        report = finetune(
            model,
            data,
            out,
            settings,
            adapter=adapter,
            dtype=dtype,
            kernels=kernels,
            mesh=_mesh(data_devices, model_devices),
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    if json:
        print_json({"target": str(out), **dataclasses.asdict(report)})
        return
    begun = f", taken up at step {report.resumed_from}" if report.resumed_from else ""
    rate = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    print(f"{out}: {report.trained:,} numbers trained on {report.examples} conversations, {report.steps} steps{begun}")
    print(f"Loss {report.losses[0]:.4f} → {report.losses[-1]:.4f}{rate}, {report.padding:.0%} of the rows padding")
    if report.cut or report.dropped:
        print(
            f"{report.cut} conversations were longer than {length} tokens and lost {report.cut_tokens} tokens; "
            f"{report.dropped} had nothing left to learn"
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _mesh(data: int, model: int):
    if data * model == 1:
        return None
    import jax

    found = len(jax.devices())
    if found < data * model:
        raise ValueError(
            f"--data-devices {data} --model-devices {model}: {data * model} devices asked for, {found} found."
        )
    return jax.make_mesh((data, model), ("data", "model"), devices=jax.devices()[: data * model])
