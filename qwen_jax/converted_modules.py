"""Modules of a folder that `convert` wrote, one at a time, as `Checkpoint` gives those of a Hugging Face folder.

Converted arrays hold several layers, and outputs side by side; here a layer's slice is read and its outputs are taken
apart again, so that a mesh of any shape can be filled from one folder without holding a whole array.
"""

from pathlib import Path

import numpy as np

from converters import names, orbax
from converters.gptq import divided
from converters.huggingface import Module, ModuleSpec
from converters.safetensors_files import Runs, at_runs, length
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.config import ModelConfig
from qwen_jax.loading import FUSED

LEAVES = ("packed", "scales", "zeros", "permutation", "data")


class ConvertedModules:
    """A converted folder with the reading side of `converters.huggingface.Checkpoint`.

    Attributes:
        config: the architecture.
    """

    def __init__(self, folder: Path):
        """Reads the manifest.

        Raises:
            CheckpointError: if the folder is incomplete.
        """
        self.folder, self.config = folder, ModelConfig.from_folder(folder)
        self._arrays, metadata = orbax.describe(folder)
        self._modules, self._blocks = metadata["modules"], metadata["blocks"]

    def sizes(self) -> dict[str, int]:
        """Bytes of each matrix, without its scales and bias."""
        found = {}
        for path in names.modules(self.config):
            spec = self.spec(path)
            bits = spec.bits if spec.kind == "quantized" else 8 * np.dtype(spec.dtype).itemsize
            assert bits is not None
            found[path] = spec.in_features * spec.out_features * bits // 8
        return found

    def spec(self, path: str) -> ModuleSpec:
        """See `Checkpoint.spec`; a permutation's digest is the name of the array that holds it."""
        name, layer, columns = self._find(path)
        statics = self._modules[name]
        part = "packed" if statics["kind"] == "quantized" else "data"
        if columns is None:
            shape = self._arrays[f"{name}.{part}"].shape
            columns = slice(0, shape[-2] if statics.get("layout") == "transposed" else shape[-1])
        has = {leaf: f"{name}.{leaf}" in self._arrays for leaf in (*LEAVES, "bias")}
        common = {"in_features": statics["in_features"], "out_features": columns.stop - columns.start}
        if statics["kind"] == "dense":
            return ModuleSpec("dense", dtype=statics["dtype"], has_bias=has["bias"], **common)
        return ModuleSpec(
            "quantized",
            dtype=str(self._arrays[f"{name}.scales"].dtype),
            has_bias=has["bias"],
            bits=statics["bits"],
            group_size=statics["group_size"],
            has_zeros=has["zeros"],
            has_permutation=has["permutation"],
            permutation_digest=name if has["permutation"] else None,
            **common,
        )

    def read(self, path: str, rows: Runs | None = None, columns: Runs | None = None) -> Module:
        """See `Checkpoint.read`; reads whole chunks of the files."""
        name, layer, place = self._find(path)
        statics = dict(self._modules[name])
        leaves = self._boxes(name, layer, statics, rows, _moved(columns, place))
        bias = self._read(f"{name}.bias", layer)
        separate = None
        if path.split(".")[-1] in ("key", "qkv"):
            separate = self._read(f"{name.rpartition('.')[0]}.separate_bias", layer)
        if separate is not None:  # kept apart because an 8-bit cache stores keys without it
            width, start = self.config.num_kv_heads * self.config.head_dim, self._start(name, "key")
            out_features = self.spec(path).out_features if place is None else self._width(name)
            bias = np.zeros(out_features, np.float32) if bias is None else bias.copy()
            bias[start : start + width] += separate
        bias = bias if bias is None or place is None else bias[place]
        statics["in_features"] = statics["in_features"] if rows is None else length(rows)
        if statics.pop("kind") == "quantized":
            leaves.pop("data")
            if leaves["permutation"] is not None:
                leaves["permutation"] = at_runs(leaves["permutation"], rows, 0)
            return Module(QuantizedTensor(**leaves, **statics), bias)
        return Module(DenseTensor(leaves["data"], **statics), bias)

    def read_permutation(self, path: str) -> np.ndarray | None:
        """See `Checkpoint.read_permutation`."""
        name, layer, _ = self._find(path)
        return self._read(f"{name}.permutation", layer)

    def read_vector(self, path: str) -> np.ndarray:
        """See `Checkpoint.read_vector`."""
        return orbax.read_array(self.folder, *self._stacked(path))

    def _boxes(self, name: str, layer: int | None, statics: dict, rows: Runs | None, columns: Runs | None) -> dict:
        """The leaves of a matrix, of these rows and columns of it."""
        boxes: dict[str, tuple] = {"data": (columns, rows)}
        if statics["kind"] == "quantized":
            groups = divided(rows, statics["group_size"])
            boxes = {"packed": (divided(rows, 32, statics["bits"]), columns)}
            boxes |= {"scales": (groups, columns), "zeros": (groups, columns)}
        return {leaf: self._read(f"{name}.{leaf}", layer, *boxes.get(leaf, ())) for leaf in LEAVES}

    # -- names ---------------------------------------------------------------------------------------------------------

    def _stacked(self, path: str) -> tuple[str, int | None]:
        """(name over a block's layers, place among them): "layers.4.mlp.down" → "layers.3-5.mlp.down", 1."""
        if not path.startswith("layers."):
            return path, None
        _, number, rest = path.split(".", 2)
        for start, stop in self._blocks:
            if start <= int(number) < stop:
                return f"layers.{start}-{stop - 1}.{rest}", int(number) - start
        raise ValueError(f"{path!r} is no module of this model of {self.config.num_layers} layers.")

    def _find(self, path: str) -> tuple[str, int | None, slice | None]:
        """(stored matrix, layer in it, columns; None for all)."""
        name, layer = self._stacked(path)
        if name in self._modules:
            return name, layer, None
        fused, _, output = name.rpartition(".")
        if output == "qkv":
            return f"{fused}.0", layer, None
        outputs = iter(FUSED[fused.rpartition(".")[2]])
        for number, widths in enumerate(self._modules[fused]["sizes"]):
            start = 0
            for width in widths:
                if next(outputs) == output:
                    return f"{fused}.{number}", layer, slice(start, start + width)
                start += width
        raise ValueError(f"{path!r} is no module of this model.")

    def _start(self, name: str, output: str) -> int:
        """The first column of an output in the matrix `name` of a fused projection."""
        fused = name.rpartition(".")[0]
        sizes, outputs = self._modules[fused]["sizes"], iter(FUSED[fused.rpartition(".")[2]])
        starts = {}
        for widths in sizes:
            starts.update(zip((next(outputs) for _ in widths), np.cumsum([0, *widths[:-1]]).tolist(), strict=True))
        return starts[output]

    def _width(self, name: str) -> int:
        fused, _, number = name.rpartition(".")
        return sum(self._modules[fused]["sizes"][int(number)])

    def _read(self, name: str, layer: int | None, *box: Runs | None) -> np.ndarray | None:
        return None if name not in self._arrays else orbax.read_array(self.folder, name, layer, *box)


def _moved(columns: Runs | None, place: slice | None) -> Runs | None:
    """Columns of an output as columns of the matrix in which it lies at `place`."""
    if place is None:
        return columns
    if columns is None:
        return (place,)
    return tuple(slice(place.start + run.start, place.start + run.stop) for run in columns)
