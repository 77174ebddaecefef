"""Where a model's parameters lie: a Hub id, a Hugging Face folder, or our own Orbax folder; and `convert`."""

from pathlib import Path
from typing import cast

import jax

from converters import orbax
from converters.huggingface import Checkpoint
from pallas_kernels.dense_matmul import DenseTensor, quantize_head
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.config import ModelConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.linear import FusedLinear, Linear, RMSNorm
from qwen_jax.loading import CheckpointWeights, kept_dtype, pack
from qwen_jax.model import Decoder, Weights
from qwen_jax.read_progress import Progress, open_checkpoint, open_modules
from qwen_jax.sharded_weights import ShardedWeights

HUB_FILES = ["*.json", "*.safetensors", "*.tiktoken", "*.txt", "*.jinja", "*.model"]


def find(name: str | Path) -> Path:
    """The folder of a checkpoint; a Hub id is downloaded to the Hub's cache (or taken from it)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = str(name)
    if folder.is_file():
        raise CheckpointError(f"{text}: is a file, expected the folder that holds it and its config.json.")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{text}: no such folder, and not a Hub id (owner/name) either. Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{text}: no such folder, not in the Hub's local cache, and the Hub cannot be reached. Check the path "
            f"or the network."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(f"{text}: the Hub refused it: {str(error).splitlines()[0]}") from error


def open_weights(
    folder: Path,
    *,
    dtype: str,
    kernels: str,
    lm_head: str | None = None,
    mesh=None,
    progress: Progress | None = None,
) -> Weights:
    """The parameters in `folder`, ready for `Decoder`; `progress` hears of files as they are read."""
    if mesh is not None:
        # ConvertedModules has the reading side of a Checkpoint, all that is wanted here
        source = cast(Checkpoint, open_modules(folder, progress)) if orbax.is_checkpoint(folder) else None
        source = source or open_checkpoint(folder, progress)
        int8_head = lm_head == "int8"
        return ShardedWeights(source, mesh, dtype=dtype, kernels=kernels, int8_head=int8_head)
    if orbax.is_checkpoint(folder):
        weights = OrbaxWeights(folder, dtype=dtype, kernels=kernels, progress=progress)
    else:
        weights = CheckpointWeights(open_checkpoint(folder, progress), dtype=dtype, kernels=kernels)
    return cast(Weights, Int8Head(weights, kernels)) if lm_head == "int8" else weights


def convert(source: str | Path, target: str | Path, progress: Progress | None = None) -> None:
    """Reads a Hugging Face folder (or Hub id) and writes our own checkpoint, which loads several times faster.

    Weights keep their bits and their dtype. The target holds configuration and tokenizer files too. `progress` is
    called with the bytes read so far and their number.

    Raises:
        CheckpointError: the source cannot be read, or the target exists.
    """
    folder = find(source)
    recorder = Recorder(CheckpointWeights(open_checkpoint(folder, progress), dtype="float32", prepack=False))
    Decoder(recorder.config, recorder, dtype="float32")
    orbax.save(Path(target), recorder.arrays, {"blocks": recorder.ranges, "modules": recorder.modules}, source=folder)


class Recorder:
    """`Weights` that passes another's through and notes every array by name, for saving."""

    def __init__(self, weights: CheckpointWeights):
        self.weights, self.config, self.cache_axis = weights, weights.config, weights.cache_axis
        self.arrays: dict[str, jax.Array] = {}
        self.modules: dict[str, dict] = {}
        self.ranges = [[layers.start, layers.stop] for layers in weights.blocks()]

    def blocks(self):
        """See `model.Weights`."""
        return self.weights.blocks()

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`."""
        fused, separate = self.weights.fused(path, outputs, layers, axes, separate_bias)
        name = _name(path, layers)
        self.modules[name] = {"sizes": [list(widths) for widths in fused.sizes]}
        for number, part in enumerate(fused.parts):
            self._note(f"{name}.{number}", part)
        if separate is not None:
            self.arrays[f"{name}.separate_bias"] = separate
        return fused, separate

    def linear(self, path, layers, axes):
        """See `model.Weights`."""
        return self._note(_name(path, layers), self.weights.linear(path, layers, axes))

    def norm(self, path, layers):
        """See `model.Weights`."""
        norm = self.weights.norm(path, layers)
        self.arrays[f"{_name(path, layers)}.scale"] = norm.scale
        return norm

    def embedding(self):
        """See `model.Weights`."""
        return self._note("embedding", self.weights.embedding())

    def head(self):
        """See `model.Weights`."""
        head = self.weights.head()
        return None if head is None else self._note("lm_head", head)

    def _note(self, name: str, linear: Linear) -> Linear:
        weight = linear.weight
        if isinstance(weight, QuantizedTensor):
            statics = {"bits": weight.bits, "group_size": weight.group_size, "in_features": weight.in_features}
            self.modules[name] = {"kind": "quantized", **statics, "layout": weight.layout}
            leaves = {part: getattr(weight, part) for part in ("packed", "scales", "zeros", "permutation")}
        else:
            statics = {"dtype": weight.dtype, "in_features": weight.in_features, "layout": weight.layout}
            self.modules[name] = {"kind": "dense", **statics}
            leaves = {"data": weight.data}
        leaves["bias"] = linear.bias
        self.arrays |= {f"{name}.{part}": leaf for part, leaf in leaves.items() if leaf is not None}
        return linear


class OrbaxWeights:
    """`Weights` restored from a folder that `convert` wrote."""

    cache_axis: str | None = None

    def __init__(self, folder: Path, *, dtype: str, kernels: str = "auto", progress: Progress | None = None):
        self.config = ModelConfig.from_folder(folder)
        self.arrays, metadata = orbax.restore(folder, progress=progress)
        self.modules, self.ranges = metadata["modules"], metadata["blocks"]
        self.dtype, self.kernels = dtype, kernels

    def blocks(self):
        """See `model.Weights`."""
        return [range(start, stop) for start, stop in self.ranges]

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`."""
        del outputs, separate_bias
        name = _name(path, layers)
        sizes = [tuple(widths) for widths in self.modules[name]["sizes"]]
        parts = [self._linear(f"{name}.{number}", axes) for number in range(len(sizes))]
        return FusedLinear(parts, sizes), self.arrays.pop(f"{name}.separate_bias", None)

    def linear(self, path, layers, axes):
        """See `model.Weights`."""
        return self._linear(_name(path, layers), axes)

    def norm(self, path, layers):
        """See `model.Weights`."""
        return RMSNorm(self.arrays.pop(f"{_name(path, layers)}.scale"), self.config.norm_epsilon)

    def embedding(self):
        """See `model.Weights`."""
        return self._linear("embedding", ("hidden", "vocabulary"))

    def head(self):
        """See `model.Weights`."""
        return None if self.config.tie_word_embeddings else self._linear("lm_head", ("hidden", "vocabulary"))

    def _linear(self, name: str, axes) -> Linear:
        # Popped, so that an array whose layout changes is freed as soon as its packed form exists.
        statics = dict(self.modules[name])
        part = {leaf: self.arrays.pop(f"{name}.{leaf}", None) for leaf in ("packed", "scales", "zeros", "permutation")}
        if statics.pop("kind") == "quantized":
            weight = QuantizedTensor(**part, **statics)
        else:
            data, dtype = self.arrays.pop(f"{name}.data"), kept_dtype(statics["dtype"], self.dtype)
            weight = DenseTensor(data.astype(dtype), **{**statics, "dtype": dtype})
        return Linear(
            pack(weight, self.kernels), self.arrays.pop(f"{name}.bias", None), axes=axes, kernels=self.kernels
        )


class Int8Head:
    """`Weights` whose output projection is rounded to 8 bits, in groups of 64, symmetric."""

    def __init__(self, weights: Weights, kernels: str):
        self._weights, self._kernels = weights, kernels

    def __getattr__(self, name):
        return getattr(self._weights, name)

    def embedding(self) -> Linear:
        """See `model.Weights`."""
        self._table = self._weights.embedding()
        return self._table

    def head(self) -> Linear:
        """See `model.Weights`; called after `embedding`."""
        head = self._weights.head() or self._table
        weight = head.weight
        if isinstance(weight, DenseTensor):
            weight = pack(quantize_head(weight), self._kernels)
        return Linear(weight, head.bias, axes=head.axes, kernels=self._kernels)


def _name(path: str, layers: range | None) -> str:
    return path if layers is None else f"layers.{layers.start}-{layers.stop - 1}.{path}"
