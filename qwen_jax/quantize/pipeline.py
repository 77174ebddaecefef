"""From a float checkpoint and calibration tokens to a quantized checkpoint folder."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

from converters import names, writer
from converters.huggingface import Checkpoint, Module
from pallas_kernels.quantized_matmul import QuantizedTensor, layout
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json
from qwen_jax.quantize.activations import ActivationStore, device_room
from qwen_jax.quantize.calibration import check_rows, read_calibration
from qwen_jax.quantize.progress import Progress, fingerprint
from qwen_jax.quantize.settings import QuantizeSettings
from qwen_jax.quantize.streams import BATCH_TOKENS, HEAD_SLICE, ModuleReport, Streams


def quantize(
    source: str | Path,
    target: str | Path,
    calibration,
    settings: QuantizeSettings | None = None,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    devices: Sequence[jax.Device] | None = None,
    memory_limit: int | None = None,
    device_limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[ModuleReport, int, int], None] = lambda report, done, total: None,
    aside: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[ModuleReport]:
    """Quantizes the layers' matrices of a checkpoint with GPTQ and writes what AutoGPTQ would write.

    One layer at a time is on the device, its float weights, the second moments of one step's inputs and a batch; the
    calibration activations wait there too while there is room (`device_limit`), then on the host, then, past
    `memory_limit`, on disk. An interrupted run, started again in the same
    way, goes on at the layer it reached and gives the same bytes; with anything changed it starts anew and says why.

    Args:
        source: a float Hugging Face folder of any supported family, or a Hub id.
        target: the folder to write; it appears complete or not at all.
        calibration: rows of token ids, or a file (see `read_calibration`, 128 rows of 512 tokens).
        settings: see `QuantizeSettings`.
        dtype: of activations: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it, else float32.
            float16 can be asked for, but activations of some models are too large for it.
        overwrite: replace a target that is there.
        resume: take up what an interrupted run has left; else begin anew.
        devices: that share the calibration rows; None for all of the default backend, but one CPU.
        memory_limit: bytes of activations kept in the host's memory; None for half of what is free.
        device_limit: bytes of activations kept on the devices, in all; None for what a layer leaves free, at most half
            of what is free before it. On CPUs nothing counts as the devices'.
        batch_tokens: calibration tokens that a device takes at once.
        progress: called after each module with its report, the modules done and their number.
        aside: called of what stands before and after the modules: "Reading the source" and its bytes done and in all,
            "Writing" and parameters done and in all.

    Returns:
        A report for each quantized module, in the order of their quantization.

    Raises:
        CheckpointError: the source cannot be read or is quantized already; the target is there.
        ValueError: bad settings or calibration rows; NaN or infinity in weights or activations, naming the module.
        OSError: no disk space.
    """
    from qwen_jax.checkpoint_store import find

    settings = QuantizeSettings() if settings is None else settings
    source, target = find(source), Path(target).absolute()
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: is there already; remove it or ask to overwrite it.")
    checkpoint = Checkpoint(source)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{source}: is quantized already ({checkpoint.quantization.where}); expected a float checkpoint."
        )
    if settings.lm_head and checkpoint.config.tie_word_embeddings:
        raise ValueError(f"lm_head: the head of {source} is its embedding, which stays float; leave lm_head out.")
    if isinstance(calibration, (str, Path)):
        from qwen_jax.tokenizer import AutoTokenizer

        calibration = read_calibration(calibration, AutoTokenizer.from_pretrained(str(source)))
    rows = check_rows(calibration, checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings)
    if devices is None:
        devices = jax.devices()[:1] if jax.default_backend() == "cpu" else jax.local_devices()
    dtype = calibration_dtype(devices[0]) if dtype == "auto" else dtype
    wanted = _modules(checkpoint, settings)
    if not wanted:
        raise ValueError("dynamic: leaves every module in float; nothing to quantize.")
    _check_space(checkpoint, wanted, settings, target)

    def reading(done: int, total: int) -> None:
        aside("Reading the source", done, total)

    mark = fingerprint(source, settings, rows, dtype, batch_tokens, reading)
    folder = target.with_name(f".{target.name}.quantizing")
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    finished = Progress(folder, mark)
    reports: list[ModuleReport] = []

    def report(each: ModuleReport) -> None:
        reports.append(each)
        progress(each, len(reports), len(wanted))

    if memory_limit is None:
        memory_limit = psutil.virtual_memory().available // 2
    if device_limit is None:
        device_limit = device_room(devices, _layer_bytes(checkpoint, batch_tokens))
    store = ActivationStore(memory_limit, folder, device_limit)
    try:
        streams = Streams(
            checkpoint,
            rows,
            settings,
            dtype=dtype,
            store=store,
            devices=devices,
            report=report,
            batch_tokens=batch_tokens,
        )
        streams.start()
        done = len(finished.layers)
        total = checkpoint.config.num_layers
        for number in range(total):
            if number < done:
                streams.replay_layer(number, finished.read(number))
                for each in finished.layers[number]["reports"]:
                    report(ModuleReport(**each))
                continue
            first = len(reports)
            tensors = streams.quantize_layer(number)
            finished.add(tensors, [dataclasses.asdict(each) for each in reports[first:]])
        head = streams.quantize_head()
    finally:
        store.close()
    writer.write(
        target,
        _parameters(checkpoint, finished, head, aside),
        config=read_json(source / "config.json"),
        quantization=settings.json(),
        source=source,
        overwrite=overwrite,
    )
    finished.remove()
    return reports


def calibration_dtype(device: jax.Device) -> str:
    """bfloat16 where the device computes in it, else float32: on older GPUs, too, where models run in float16.

    What models run in is no help here: activations beyond float16's range would be infinite, and end the run.
    """
    from qwen_jax.causal_lm import default_dtype  # late: it loads the whole model code

    return "bfloat16" if default_dtype(device) == "bfloat16" else "float32"


def _modules(checkpoint: Checkpoint, settings: QuantizeSettings) -> list[str]:
    """Our paths of the modules that will be quantized."""
    parsed, family = settings.parsed(), checkpoint.config.family
    paths = [path for path in names.modules(checkpoint.config) if path != "embedding"]
    return [path for path in paths if settings.matrix(names.theirs(family, path), parsed) is not None]


def _layer_bytes(checkpoint: Checkpoint, batch_tokens: int) -> int:
    """About what a device needs for one layer beside the calibration activations, from above.

    Its weights as they are and as they become, each in float32; of the largest matrix and of the largest H eight
    arrays in float32 each (H, its factor, its order, errors, aims, …); a batch's inner activations and the scores of
    its attention likewise.
    """
    config = checkpoint.config
    shapes = [shape for path, shape in names.modules(config).items() if path.startswith("layers.0.")]
    weights = sum(in_features * out_features for in_features, out_features in shapes)
    widest = max(in_features for in_features, _ in shapes)
    batch = 4 * batch_tokens * config.intermediate_size + 3 * batch_tokens * config.num_heads * 2048
    return 4 * (2 * weights + 8 * widest**2 + 8 * max(weights // 2, config.hidden_size * HEAD_SLICE) + batch)


def _parameters(
    checkpoint: Checkpoint, finished: Progress, head: QuantizedTensor | None, aside: Callable[[str, int, int], None]
) -> Iterator[tuple[str, Any]]:
    """All parameters of the new checkpoint, a layer in memory at a time."""
    number, layer, paths = -1, {}, list(checkpoint.paths)
    for done, path in enumerate(paths, 1):
        aside("Writing", done, len(paths))
        parts = path.split(".", 2)
        if path.endswith(".scale"):
            yield path, checkpoint.read_vector(path)
            continue
        tensor = head if path == "lm_head" else None
        if parts[0] == "layers":
            if int(parts[1]) != number:
                number = int(parts[1])
                layer = finished.read(number)
            tensor = layer.get(parts[2])
        module = checkpoint.read(path)
        yield path, module if tensor is None else Module(tensor, module.bias)


def _check_space(checkpoint: Checkpoint, wanted: Sequence[str], settings: QuantizeSettings, target: Path) -> None:
    """Refuses to begin where the end would find no room: the new checkpoint and, until then, its layers once more."""
    parsed, shapes, family = settings.parsed(), names.modules(checkpoint.config), checkpoint.config.family
    packed = 0
    for path in wanted:
        in_features, out_features = shapes[path]
        matrix = settings.matrix(names.theirs(family, path), parsed)
        assert matrix is not None
        groups = 1 if matrix.group_size == -1 else -(-in_features // matrix.group_size)
        packed += 4 * layout.words(in_features, matrix.bits) * out_features + groups * out_features * 3
    rest = sum(checkpoint.nbytes(path) for path in checkpoint.paths if path not in set(wanted))
    needed = 2 * packed + rest
    parent = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"{parent}: {free / 1e9:.2f} GB are free, expected at least {needed / 1e9:.2f} GB for the new checkpoint "
            f"and its progress. Free some, or write elsewhere."
        )
