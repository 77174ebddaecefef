"""The calibration data on its way through the layers, as the float model and as the quantized one see it.

What one layer needs is on the device; activations wait on the host or on disk. Within a layer the order is
true-sequential: query, key, value; output; gate, up; down. Each sees its inputs as the modules before it, quantized,
make them.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from converters import names
from converters.huggingface import Checkpoint
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax.linear import RMSNorm
from qwen_jax.quantize.activations import ActivationStore
from qwen_jax.quantize.gptq import MatrixSettings, QuantizedMatrix, quantize_matrix
from qwen_jax.quantize.hessian import Moments
from qwen_jax.quantize.layer import Layer, check_finite, normed
from qwen_jax.quantize.settings import QuantizeSettings

HEAD_SLICE = 1 << 14  # outputs of the head that are quantized at a time
BATCH_TOKENS = 4096  # of a device's share of a batch; enough that a product's overhead is small beside it


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """What quantizing one module came to.

    Attributes:
        path: our path.
        bits: of its integers.
        error: squared error of its outputs on the calibration data, relative to the outputs.
        damp: damping that was used.
        seconds: time from the first batch of its step to its end, shared by the modules of one step.
    """

    path: str
    bits: int
    error: float
    damp: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of calibration tokens, padded on the right."""

    ids_BT: np.ndarray
    lengths_B: np.ndarray

    @property
    def mask_BT(self) -> np.ndarray:
        """1.0 for a token, 0.0 for padding."""
        return (np.arange(self.ids_BT.shape[1]) < self.lengths_B[:, None]).astype(np.float32)


def batches(rows: Sequence[np.ndarray], tokens: int, multiple: int = 1) -> list[Batch]:
    """Rows sorted by length; a batch has a multiple of `multiple` rows, each share at most `tokens` padded tokens."""
    ordered = sorted(rows, key=len, reverse=True)
    found = []
    while ordered:
        longest = len(ordered[0])
        count = max(tokens // longest, 1) * multiple
        part, ordered = ordered[:count], ordered[count:]
        ids_BT = np.zeros((-(-len(part) // multiple) * multiple, longest), np.int32)
        lengths_B = np.zeros(len(ids_BT), np.int32)
        for row, ids in enumerate(part):
            ids_BT[row, : len(ids)], lengths_B[row] = ids, len(ids)
        found.append(Batch(ids_BT, lengths_B))
    return found


class Streams:
    """Two residual streams, quantized and (with error propagation) float, taken through one layer after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: Sequence[np.ndarray],
        settings: QuantizeSettings,
        *,
        dtype: str,
        store: ActivationStore,
        devices: Sequence[jax.Device],
        report: Callable[[ModuleReport], None],
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.checkpoint, self.settings, self.config = checkpoint, settings, checkpoint.config
        self.dtype, self.store, self.report = dtype, store, report
        mesh = jax.sharding.Mesh(np.array(devices), ("data",))
        self._split = jax.sharding.NamedSharding(mesh, jax.P("data"))
        self._whole = jax.sharding.NamedSharding(mesh, jax.P())
        self._first = devices[0]
        self.batches = batches(rows, batch_tokens, len(devices))
        self.propagate = settings.propagation > 0
        self.parsed = settings.parsed()

    def start(self) -> None:
        """Looks the tokens up.

        Raises:
            ValueError: NaN or infinity in what stands outside the layers, also where no token reaches it.
        """
        table_VD = self.checkpoint.read("embedding").weight.data
        finite = {"embedding": _finite(table_VD)}
        finite["final_norm.scale"] = _finite(self.checkpoint.read_vector("final_norm.scale"))
        if "lm_head" in self.checkpoint.paths:
            finite["lm_head"] = _finite(self.checkpoint.read("lm_head").weight.data)
        check_finite(finite)
        for b, batch in enumerate(self.batches):
            hidden_BTD = self._put(table_VD[batch.ids_BT].astype(jnp.dtype(self.dtype)))
            self.store.put("hidden", b, hidden_BTD)
            if self.propagate:
                self.store.put("float_hidden", b, hidden_BTD)

    def read_layer(self, number: int) -> Layer:
        """A layer of the float checkpoint on the devices."""
        return Layer.read(self.checkpoint, number, self.dtype, self._replicate)

    def quantize_layer(self, number: int) -> dict[str, QuantizedTensor]:
        """Quantizes a layer's modules and moves both streams behind it."""
        return dict(self._steps(number, self._quantize))

    def replay_layer(self, number: int, tensors: dict[str, QuantizedTensor]) -> None:
        """Moves both streams behind a layer that was quantized before."""

        def solve(layer, number, paths, moments, start):
            del number, moments, start
            for path in paths:
                if path in tensors:
                    layer.replace(path, self._replicate(dequantize(tensors[path], np.float32)))
                    yield path, tensors[path]

        for _ in self._steps(number, solve, measure=False):
            pass

    def quantize_head(self) -> QuantizedTensor | None:
        """Quantizes the output projection, in slices of its outputs; None if it stays float."""
        name = names.theirs(self.config.family, "lm_head")
        matrix = self.settings.matrix(name, self.parsed)
        if matrix is None:
            return None
        start = time.perf_counter()
        scale = self._replicate(self.checkpoint.read_vector("final_norm.scale").astype(np.float32))
        norm = RMSNorm(scale[None], self.config.norm_epsilon)
        moments = Moments(self.config.hidden_size)
        for b, batch in enumerate(self.batches):
            x_BTI = normed(norm, self._get("hidden", b))
            missing_BTI = normed(norm, self._get("float_hidden", b)) - x_BTI if self.propagate else None
            moments.add(x_BTI, self._put(batch.mask_BT), missing_BTI)
        head_OI = self.checkpoint.read("lm_head").weight.data
        hessian_II, results = moments.hessian(self._first), []
        for first in range(0, len(head_OI), HEAD_SLICE):
            weight_IO = np.ascontiguousarray(head_OI[first : first + HEAD_SLICE].astype(np.float32).T)
            results.append(self._solve(weight_IO, hessian_II, matrix, moments, "lm_head"))
        seconds = time.perf_counter() - start
        error = sum(result.error for result in results) / len(results)
        self.report(ModuleReport("lm_head", matrix.bits, error, results[0].damp, seconds))
        tensors = [result.tensor for result in results]
        joined = {
            part: np.concatenate([getattr(tensor, part) for tensor in tensors], axis=1)
            for part in ("packed", "scales", "zeros")
            if getattr(tensors[0], part) is not None
        }
        return dataclasses.replace(tensors[0], **joined)

    def _steps(self, number: int, solve, measure: bool = True) -> Iterator[tuple[str, QuantizedTensor]]:
        exact = self.read_layer(number)
        layer = exact.copy()
        inputs = [path for path in layer.projections if path.startswith("attention.") and path != "attention.output"]
        first = number == 0  # where both streams are still the same
        steps = (
            (inputs, self._before_attention),
            (["attention.output"], self._before_output),
            (["mlp.gate", "mlp.up"], self._before_mlp),
            (["mlp.down"], self._before_down),
        )
        for paths, run in steps:
            start = time.perf_counter()
            wanted = measure and any(self._settings(number, path) is not None for path in paths)
            moments = Moments(layer.projections[paths[0]].weight_IO.shape[0]) if wanted else None
            for b, batch in enumerate(self.batches):
                run(b, batch, layer, exact, moments, first)
            yield from solve(layer, number, paths, moments, start)
        for b in range(len(self.batches)):
            self._advance(b, layer, "mlp.down", "hidden", "inner")
            if self.propagate:
                self._advance(b, exact, "mlp.down", "float_hidden", "float_inner")

    # -- the steps: each computes the inputs of one group of projections for one batch, and adds to its moments

    def _before_attention(self, b, batch, layer: Layer, exact: Layer, moments, first):
        if moments is None:
            return
        x_BTI = layer.attention_input(self._get("hidden", b))
        missing_BTI = None
        if self.propagate and not first:
            missing_BTI = exact.attention_input(self._get("float_hidden", b)) - x_BTI
        moments.add(x_BTI, self._put(batch.mask_BT), missing_BTI)

    def _before_output(self, b, batch, layer, exact, moments, first):
        lengths_B, hidden_BTD = self._put(batch.lengths_B), self._get("hidden", b)
        x_BTI = layer.attended(hidden_BTD, lengths_B)
        self.store.put("inner", b, x_BTI)
        missing_BTO = None
        if self.propagate:
            float_BTD = self._get("float_hidden", b)
            float_BTI = exact.attended(float_BTD, lengths_B)
            self.store.put("float_inner", b, float_BTI)
            missing_BTO = _missing(
                exact.projections["attention.output"].weight_IO, float_BTI, x_BTI, float_BTD, hidden_BTD
            )
        if moments is not None:
            moments.add(x_BTI, self._put(batch.mask_BT), None, missing_BTO)

    def _before_mlp(self, b, batch, layer, exact, moments, first):
        hidden_BTD = self._advance(b, layer, "attention.output", "hidden", "inner")
        x_BTI = layer.mlp_input(hidden_BTD)
        missing_BTI = None
        if self.propagate:
            missing_BTI = (
                exact.mlp_input(self._advance(b, exact, "attention.output", "float_hidden", "float_inner")) - x_BTI
            )
        if moments is not None:
            moments.add(x_BTI, self._put(batch.mask_BT), missing_BTI)

    def _before_down(self, b, batch, layer, exact, moments, first):
        hidden_BTD = self._get("hidden", b)
        x_BTI = layer.activated(hidden_BTD)
        self.store.put("inner", b, x_BTI)
        missing_BTO = None
        if self.propagate:
            float_BTD = self._get("float_hidden", b)
            float_BTI = exact.activated(float_BTD)
            self.store.put("float_inner", b, float_BTI)
            weight_IO = exact.projections["mlp.down"].weight_IO
            missing_BTO = _missing(weight_IO, float_BTI, x_BTI, float_BTD, hidden_BTD)
        if moments is not None:
            moments.add(x_BTI, self._put(batch.mask_BT), None, missing_BTO)

    def _advance(self, b, layer: Layer, path: str, hidden: str, inner: str):
        """Adds a projection's output to the residual stream."""
        hidden_BTD = layer.add(path, self._get(hidden, b), self._get(inner, b))
        self.store.drop(inner, b)
        self.store.put(hidden, b, hidden_BTD)
        return hidden_BTD

    # -- what happens to the weights

    def _quantize(self, layer: Layer, number: int, paths: list[str], moments: Moments | None, start: float):
        """Quantizes the modules of a step, those with the same settings as one matrix."""
        if moments is None:
            return
        hessian_II = moments.hessian(self._first)
        alike: dict[MatrixSettings, list[str]] = {}
        for path in paths:
            if (matrix := self._settings(number, path)) is not None:
                alike.setdefault(matrix, []).append(path)
        for matrix, group in alike.items():
            weights = [jax.device_put(layer.projections[path].weight_IO, self._first) for path in group]
            weight_IO = jnp.concatenate(weights, axis=1)
            where = ", ".join(f"layers.{number}.{path}" for path in group)
            result = self._solve(weight_IO, hessian_II, matrix, moments, where)
            seconds = (time.perf_counter() - start) / len(paths)
            for path, (tensor, part_IO) in zip(group, _parts(result, [w.shape[1] for w in weights]), strict=True):
                layer.replace(path, self._replicate(part_IO))
                self.report(ModuleReport(f"layers.{number}.{path}", matrix.bits, result.error, result.damp, seconds))
                yield path, tensor

    def _solve(self, weight_IO, hessian_II, matrix, moments: Moments, where: str) -> QuantizedMatrix:
        cross_IO = moments.cross(weight_IO, self._first)
        if cross_IO is not None:
            cross_IO = cross_IO * self.settings.propagation
        return quantize_matrix(weight_IO, hessian_II, matrix, cross_IO=cross_IO, where=where)

    def _settings(self, number: int, path: str):
        return self.settings.matrix(names.theirs(self.config.family, f"layers.{number}.{path}"), self.parsed)

    def _replicate(self, array):
        return jax.device_put(array, self._whole)

    def _put(self, array):
        return jax.device_put(array, self._split)

    def _get(self, name: str, b: int):
        return self._put(self.store.get(name, b))


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite; a part of the rows at a time, for tables are large."""
    return all(np.isfinite(array[first : first + HEAD_SLICE]).all() for first in range(0, len(array), HEAD_SLICE))


@jax.jit
def _missing(weight_IO, float_BTI, x_BTI, float_BTD, hidden_BTD):
    """What the projection's output should gain: (x_float − x) W and the residual stream's own difference."""
    difference_BTI = (float_BTI - x_BTI).astype(jnp.float32)
    gain_BTO = jnp.dot(difference_BTI, weight_IO, precision=jax.lax.Precision.HIGHEST)
    return gain_BTO + (float_BTD - hidden_BTD).astype(jnp.float32)


def _parts(result: QuantizedMatrix, widths: list[int]) -> Iterator[tuple[QuantizedTensor, jax.Array]]:
    """The matrices that lie side by side in one."""
    start, tensor = 0, result.tensor
    for width in widths:
        columns = slice(start, start + width)
        part = dataclasses.replace(
            tensor,
            packed=np.ascontiguousarray(tensor.packed[:, columns]),
            scales=np.ascontiguousarray(tensor.scales[:, columns]),
            zeros=None if tensor.zeros is None else np.ascontiguousarray(tensor.zeros[:, columns]),
        )
        yield part, result.weight_IO[:, columns]
        start += width
