"""A Hugging Face checkpoint folder, float or quantized: checked when opened, read one tensor at a time."""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from converters import gptq, names
from converters.safetensors_files import Runs, StoredTensor, folder_tensors, length
from converters.writer import FORMATS, Module, write
from pallas_kernels.dense_matmul.tensor import DenseTensor
from qwen_jax.config import ModelConfig, QuantizationConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json
from qwen_jax.quantization_config import ModuleSettings

__all__ = ["Checkpoint", "Module", "ModuleSpec", "write"]

logger = logging.getLogger("qwen_jax")

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDICES = ("I32", "I64")
KINDS = {"weight": FLOATS, "scales": FLOATS, "weight_scale": FLOATS}
KINDS |= {"g_idx": INDICES, "weight_g_idx": INDICES, "weight_shape": INDICES}
PACKED = {reader.PACKED: method for method, reader in FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
    """What a module will be once read; equal specs can share one block of stacked layers.

    Attributes:
        kind: "dense" or "quantized".
        in_features: rows of the logical matrix.
        out_features: columns.
        dtype: of the weight, or of the scales.
        has_bias: whether it has a bias that is not all zero.
        bits: None for a dense module, as the next four.
        group_size: inputs that share a scale, never −1.
        has_zeros: whether some zero-point is not 2^(bits − 1).
        has_permutation: whether it has act-order.
        permutation_digest: equal for equal permutations; None without.
        zero_convention: "v1" (stored minus 1) or "v2" (as they are).
    """

    kind: str
    in_features: int
    out_features: int
    dtype: str
    has_bias: bool
    bits: int | None = None
    group_size: int | None = None
    has_zeros: bool = False
    has_permutation: bool = False
    permutation_digest: str | None = None
    zero_convention: str | None = None


class Checkpoint:
    """A Hugging Face folder; opening it reads JSON and headers alone, and checks that names and shapes all fit.

    Attributes:
        folder: where it lies.
        config: the architecture.
        quantization: the quantization settings; None for a float checkpoint.
    """

    def __init__(self, folder: str | Path):
        """Opens a folder.

        Raises:
            CheckpointError: for tensors without a place and parameters without a tensor, shapes, dtypes or quantization
                settings that contradict each other, damaged or missing files; names the file and the tensor.
        """
        self.folder = Path(folder)
        self.config = ModelConfig.from_folder(self.folder)
        self.quantization = QuantizationConfig.from_folder(self.folder)
        self._modules = names.modules(self.config)
        self._vectors = names.vectors(self.config)
        self._specs: dict[str, ModuleSpec] = {}
        self._stored: dict[str, dict[str, StoredTensor]] = {}
        self._tied_head: StoredTensor | None = None
        self._place(folder_tensors(self.folder))
        for path in self._modules:
            self._check_module(path)
        self._tell_unused_rules()
        for path, features in self._vectors.items():
            self._check(self._stored[path]["weight"], (features,), FLOATS)
        raw = read_json(self.folder / "config.json")
        if not any(raw.get(key) for key in ("dtype", "torch_dtype", "bf16", "fp16", "fp32")):
            dtype = FLOATS[self._stored["final_norm.scale"]["weight"].dtype]
            self.config = dataclasses.replace(self.config, dtype=dtype)

    @property
    def paths(self) -> list[str]:
        """Our paths of all modules and vectors."""
        return [*self._modules, *self._vectors]

    def module_name(self, path: str) -> str:
        """The name of a module or norm in the file, e.g. "model.layers.0.mlp.up_proj"."""
        return names.theirs(self.config.family, path)

    def nbytes(self, path: str) -> int:
        """Bytes that a module or vector takes in the files."""
        return sum(tensor.nbytes for tensor in self._stored[path].values())

    def spec(self, path: str) -> ModuleSpec:
        """What `read(path)` will give; reads zero-points, group indices and bias, not the weight."""
        if path not in self._specs:
            self._specs[path] = self._spec(path)
        return self._specs[path]

    def read(self, path: str, rows: Runs | None = None, columns: Runs | None = None) -> Module:
        """A module's arrays, e.g. "layers.0.mlp.up"; the embedding is a matrix of logical shape [D, V].

        Args:
            path: of the module.
            rows: runs of its inputs; None for all. Of a quantized one whole words and groups (words alone of a
                single group); of one with act-order in the order of its groups, as the whole module has them.
            columns: runs of its outputs; None for all. The weight is that of these rows and columns, and no other of
                its bytes are read, but for act-order's neighbours in a word; the bias is whole.

        Raises:
            CheckpointError: if the tensors contradict the settings.
        """
        stored, (in_features, out_features) = self._parts(path), self._modules[path]
        bias = self._bias(path)
        if (found := self._format(path)) is None:
            if path == "embedding" and self._tied_head is not None:
                _refuse_unequal(stored["weight"], self._tied_head)
            data = stored["weight"].read_box(columns, rows)
            in_features = in_features if rows is None else length(rows)
            return Module(DenseTensor(data, FLOATS[stored["weight"].dtype], in_features, "transposed"), bias)
        reader, settings, config = found
        boxes = reader.boxes(settings, rows, columns)
        if rows is not None and (permutation := self.read_permutation(path)) is not None:
            words = gptq.scattered(permutation, rows, settings.bits)
            boxes[reader.PACKED] = reader.boxes(settings, words, columns)[reader.PACKED]
        parts = {
            name: tensor.read_box(*boxes[name]) if name in boxes else tensor.read()
            for name, tensor in stored.items()
            if name != "bias"
        }
        where = self._where(path)
        return Module(reader.read(parts, settings, config, in_features, where, rows, columns, out_features), bias)

    def read_permutation(self, path: str) -> np.ndarray | None:
        """The act-order of a module, int32 [in], as `read` gives it; nothing else of the module is read."""
        if (found := self._format(path)) is None:
            return None
        (reader, settings, _), indices = found, ("g_idx", "weight_g_idx")
        parts = {name: tensor.read() for name, tensor in self._parts(path).items() if name in indices}
        return reader.read_permutation(parts, settings, self._modules[path][0], self._where(path))

    def read_vector(self, path: str) -> np.ndarray:
        """A norm's scale, e.g. "layers.0.attention_norm.scale", in the file's dtype."""
        if path not in self._vectors:
            raise ValueError(f"{path!r} is no vector of this model, expected e.g. 'final_norm.scale'.")
        return self._stored[path]["weight"].read()

    def _place(self, tensors: dict[str, StoredTensor]) -> None:
        """Sorts the file's tensors by our paths and refuses what has no place or is missing."""
        homeless = []
        for name, tensor in tensors.items():
            found = names.ours(self.config.family, name)
            if found is not None and (found[0] in self._modules or found[0] in self._vectors):
                self._stored.setdefault(found[0], {})[found[1]] = tensor
            elif found == ("lm_head", "weight"):
                self._tied_head = tensor
            elif not names.is_buffer(name):
                homeless.append(name)
        empty = [
            f"{self.module_name(path)}.weight"
            for path in (*self._modules, *self._vectors)
            if not any(name in self._stored.get(path, {}) for name in ("weight", *PACKED))
        ]
        if "lm_head.weight" in empty and "weight" in self._stored.get("embedding", {}):
            raise CheckpointError(
                f"{self.folder}: lm_head.weight is missing, but tie_word_embeddings is false in config.json; set it to "
                "true if the head is the embedding."
            )
        if homeless or empty:
            raise CheckpointError(
                f"{self.folder}: tensors without a place: {_some(homeless)}; parameters without a tensor: "
                f"{_some(empty)}; expected those of a {self.config.family} model of {self.config.num_layers} layers."
            )
        if self._tied_head is not None:
            self._check(self._tied_head, self._stored["embedding"]["weight"].shape, FLOATS)

    def _tell_unused_rules(self) -> None:
        modules = [self.module_name(path) for path in self._modules]
        for pattern in self.quantization.unused_rules(modules) if self.quantization else ():
            logger.info("%s: dynamic rule %r matches no module.", self.folder, pattern)

    def _where(self, path: str) -> str:
        return f"{self.folder}: {self.module_name(path)}"

    def _parts(self, path: str) -> dict[str, StoredTensor]:
        if path not in self._modules:
            raise ValueError(f"{path!r} is no matrix of this model, expected e.g. 'layers.0.mlp.up'.")
        return self._stored[path]

    def _format(self, path: str) -> tuple[Any, ModuleSettings, QuantizationConfig] | None:
        """How a quantized module is read: its format, its settings, those of the checkpoint; None for a float one.

        Raises:
            CheckpointError: if the tensors that are there contradict the settings.
        """
        stored, where, config = self._stored[path], self._where(path), self.quantization
        advice = "correct the settings (dynamic, modules_in_block_to_quantize, lm_head, ignore)"
        packed = next((name for name in PACKED if name in stored), None)
        if packed and "weight" in stored:
            raise CheckpointError(f"{where}: has both weight and {packed}, expected one of them.")
        if config is None:
            if packed:
                raise CheckpointError(
                    f"{where}: is quantized, but there is neither quantize_config.json nor config.json's "
                    "quantization_config; one of them must tell bits and group_size."
                )
            return None
        settings = config.for_module(self.module_name(path))
        if packed and path == "embedding":
            raise CheckpointError(
                f"{where}: is quantized, which is not supported for the embedding; leave it in float."
            )
        if packed and (settings is None or PACKED[packed] != config.method):
            what = "a float module" if settings is None else f"of quant_method {config.method!r}"
            raise CheckpointError(f"{where}: the file holds {packed}, but by {config.where} it is {what}; {advice}.")
        if settings is not None and not packed:
            raise CheckpointError(
                f"{where}: the file holds a float weight, but by {settings.rule} it has {settings.bits} bits; {advice}."
            )
        return None if settings is None else (FORMATS[config.method], settings, config)

    def _check_module(self, path: str) -> None:
        """Refuses a module whose tensors are not those of its shape and settings."""
        stored, (in_features, out_features), where = self._stored[path], self._modules[path], self._where(path)
        expected: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        hint = ""
        if (found := self._format(path)) is not None:
            reader, settings, config = found
            expected = reader.shapes(settings, in_features, out_features)
            if missing := [name for name in reader.required(settings) if name not in stored]:
                raise CheckpointError(f"{where}: has no {', '.join(missing)}, which {config.method} needs.")
            group_size, groups = gptq.group_size_and_count(settings, in_features)
            hint = (
                f" for {settings.bits} bits and ceil({in_features} / {group_size}) = {groups} groups by {settings.rule}"
            )
        self._check_bias(path, out_features)
        for name, tensor in stored.items():
            if name == "bias":
                continue
            if name not in expected:
                raise CheckpointError(f"{tensor.file}: {tensor.name}: has no place in this module.")
            self._check(tensor, expected[name], KINDS.get(name, ("I32",)), hint)

    def _check(self, tensor: StoredTensor, shape: tuple[int, ...], dtypes, hint: str = "") -> None:
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: dtype {tensor.dtype}, expected {', '.join(dtypes)}.")
        if tensor.shape != shape:
            source = hint or f" by {self.folder / 'config.json'}"
            raise CheckpointError(
                f"{tensor.file}: {tensor.name}: shape {list(tensor.shape)}, expected {list(shape)}{source}."
            )

    def _check_bias(self, path: str, out_features: int) -> None:
        stored, may_have = self._stored[path], names.may_have_bias(self.config, path)
        if "bias" not in stored:
            if may_have:
                raise CheckpointError(
                    f"{self._where(path)}.bias: is missing, but a {self.config.family} model has it; set "
                    "attention_bias to false in config.json if it has not."
                )
            return
        self._check(stored["bias"], (out_features,), FLOATS)
        if not may_have and stored["bias"].read().any():
            raise CheckpointError(
                f"{stored['bias'].file}: {stored['bias'].name}: is not zero, but a {self.config.family} model has no "
                "bias there."
            )

    def _bias(self, path: str) -> np.ndarray | None:
        tensor = self._stored[path].get("bias")
        bias = None if tensor is None else tensor.read()
        return bias if bias is not None and bias.any() else None

    def _spec(self, path: str) -> ModuleSpec:
        stored, (in_features, out_features) = self._parts(path), self._modules[path]
        has_bias = self._bias(path) is not None
        if (found := self._format(path)) is None:
            return ModuleSpec("dense", in_features, out_features, FLOATS[stored["weight"].dtype], has_bias)
        (reader, settings, config), where = found, self._where(path)
        parts = {
            name: tensor.read() for name, tensor in stored.items() if name not in ("bias", "scales", reader.PACKED)
        }
        zeros, convention = reader.read_zeros(parts, settings, config, out_features, where)
        permutation = reader.read_permutation(parts, settings, in_features, where)
        return ModuleSpec(
            kind="quantized",
            in_features=in_features,
            out_features=out_features,
            dtype=FLOATS[stored[reader.SCALES].dtype],
            has_bias=has_bias,
            bits=settings.bits,
            group_size=gptq.group_size_and_count(settings, in_features)[0],
            has_zeros=zeros is not None,
            has_permutation=permutation is not None,
            permutation_digest=None if permutation is None else hashlib.sha256(permutation.tobytes()).hexdigest()[:16],
            zero_convention=convention,
        )


def _refuse_unequal(embedding: StoredTensor, head: StoredTensor) -> None:
    """A tied head that is stored all the same must be the embedding; compared a few rows at a time."""
    for start in range(0, embedding.shape[0], 4096):
        rows = slice(start, start + 4096)
        if not np.array_equal(embedding.read(rows), head.read(rows).astype(embedding.numpy_dtype)):
            raise CheckpointError(
                f"{head.file}: lm_head.weight is not {embedding.name}, but tie_word_embeddings is true in config.json; "
                "set it to false if the head is one of its own."
            )


def _some(found: list[str], limit: int = 5) -> str:
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return (", ".join(found[:limit]) or "none") + more
