"""The public quantized matmul, and which kernel runs it where."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chip import default_chip
from pallas_kernels.input_derivative import input_derivative
from pallas_kernels.quantized_matmul import exact, mosaic_gpu, mosaic_tpu, transposed, xla
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.stack import one_bias, take_layer
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

logger = logging.getLogger(__name__)

# Best first; xla takes everything in layout "gptq", and exact runs only where it is named. A kernel is a module with
#   unsupported(shape: MatmulShape, chip) -> None, or one sentence that says why not
#   form(shape, chip) -> str              one line for the log and `info`
#   run(x_MI, weight, layer, bias_O, chip) -> [M, O] in x's dtype: x's columns already follow the stored rows (act-order
#       is gathered before), layer is None or an index into the stack (an int or a traced int32), bias_O is added in
#       float32; with TAKES_STACKED_BIAS it may also be [layers, out], which saves a launch that slices it
#   and, where it wants a layout of its own: LAYOUT (its name), prepack(weight) and unpack(weight), exact inverses.
KERNELS: dict[str, Any] = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu, "xla": xla, "exact": exact}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel runs.

    Attributes:
        name: a key of `KERNELS`.
        form: how it computes, one line.
        refusals: (name, reason) of each better kernel that cannot run here.
    """

    name: str
    form: str
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refusals)
        return f"{self.name} ({self.form})" + (f" ({reasons})" if reasons else "")


def quantized_matmul(
    x_MI: jax.Array,
    weight: QuantizedTensor,
    *,
    layer: jax.Array | int | None = None,
    bias_O: jax.Array | None = None,
    kernels: str = "auto",
    chip: str | None = None,
) -> jax.Array:
    """Multiplies by a packed weight: out[m, o] = Σᵢ x[m, i] · scale[g(i), o] · (q[i, o] − zero[g(i), o]) + bias[o].

    Sums are float32. Format: GPTQ (arXiv:2210.17323), files as AutoGPTQ 0.7.1 writes them. For few rows the weight is
    read once, packed, and its dequantized form never reaches memory; for many rows one layer at a time is dequantized
    where the kernel chosen says so (`choose`).

    It can be differentiated with respect to x alone, in reverse (`transposed.py`): weight and bias are constants.

    Args:
        x_MI: [..., in], float32, bfloat16 or float16; any leading dimensions.
        weight: QuantizedTensor of logical shape [in, out] or, with `layer`, [layers, in, out].
        layer: which matrix of a stack, an int or an int32 scalar (may be traced); None for a single matrix.
        bias_O: [out] or, like a stacked weight, [layers, out]; added in float32. None for no bias.
        kernels: "auto" or a name in `KERNELS`.
        chip: `device_kind` of the device it will run on; None for JAX's default device.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: if shapes disagree or the named kernel cannot run here; the message says why.
    """
    lead = check_operands("quantized_matmul", x_MI, weight, layer, bias_O)
    chip = default_chip() if chip is None else chip
    choice = choose(shape_of(x_MI, weight), chip, kernels)
    rows_MI = x_MI.reshape(math.prod(lead), weight.in_features)
    kernel = KERNELS[choice.name]
    if not getattr(kernel, "TAKES_STACKED_BIAS", False):
        bias_O = one_bias(bias_O, layer)

    def forward(x_MI, weight, layer, bias_O):
        if weight.permutation is not None:
            x_MI = x_MI[:, take_layer(weight.permutation, layer)]
        return kernel.run(x_MI, weight, layer, bias_O, chip)

    backward = functools.partial(transposed.run, unpack=unpack, chip=chip)
    result_MO = input_derivative(forward, backward, rows_MI, weight, layer, bias_O)
    return result_MO.reshape(*lead, weight.out_features)


def choose(shape: MatmulShape, chip: str, kernels: str = "auto") -> Choice:
    """Says which kernel runs `shape` on `chip` (a `device_kind`, as "cpu" or "NVIDIA H100 80GB HBM3").

    Raises:
        ValueError: if `kernels` is unknown, or names a kernel that cannot run the shape on the chip.
    """
    if kernels not in ("auto", *KERNELS):
        raise ValueError(f"kernels={kernels!r} is none of {['auto', *KERNELS]}.")
    refusals: dict[str, str] = {}
    for name in KERNELS if kernels == "auto" else [kernels]:
        reason = KERNELS[name].unsupported(shape, chip)
        if reason is None:
            choice = Choice(name, KERNELS[name].form(shape, chip), tuple(refusals.items()))
            log_choice("quantized_matmul", chip, choice)
            return choice
        refusals[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ValueError(f"kernels={kernels!r} cannot run {shape} on {chip}: {reasons}.")


def prepack(weight: QuantizedTensor, kernels: str = "auto", chip: str | None = None) -> QuantizedTensor:
    """The same weight (layout "gptq") in the layout that the kernel chosen for decoding wants; `unpack` goes back."""
    chip = default_chip() if chip is None else chip
    shape = _shape(1, "bfloat16", weight)
    for name in KERNELS if kernels == "auto" else [kernels] if kernels in KERNELS else []:
        kernel = KERNELS[name]
        own = dataclasses.replace(shape, layout=getattr(kernel, "LAYOUT", shape.layout))
        if kernel.unsupported(own, chip) is None:
            return kernel.prepack(weight) if hasattr(kernel, "prepack") else weight
    choose(shape, chip, kernels)  # says why none of them can
    return weight


def unpack(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight in layout "gptq", exactly as it was before `prepack`."""
    if weight.layout == "gptq":
        return weight
    for kernel in KERNELS.values():
        if getattr(kernel, "LAYOUT", "gptq") == weight.layout:
            return kernel.unpack(weight)
    raise ValueError(f"layout={weight.layout!r} belongs to none of the kernels {list(KERNELS)}.")


def shape_of(x_MI: jax.Array, weight: QuantizedTensor) -> MatmulShape:
    """The `MatmulShape` of a call, which `choose` takes."""
    return _shape(math.prod(x_MI.shape[:-1]), jnp.dtype(x_MI.dtype).name, weight)


def _shape(rows: int, dtype: str, weight: QuantizedTensor) -> MatmulShape:
    return MatmulShape(
        rows=rows,
        in_features=weight.in_features,
        out_features=weight.out_features,
        bits=weight.bits,
        group_size=weight.group_size,
        zeros=weight.zeros is not None,
        permutation=weight.permutation is not None,
        dtype=dtype,
        layout=weight.layout,
        layers=weight.stack[0] if weight.stack else 0,
    )


@functools.cache
def log_choice(operation: str, chip: str, choice: Choice) -> None:
    """Logs a choice, each distinct one once."""
    logger.info("%s on %s: %s", operation, chip, choice)


def check_operands(operation: str, x_MI, weight, layer, bias_O) -> tuple[int, ...]:
    """Checks what quantized and dense matmul have in common; returns x's leading dimensions."""
    if jnp.dtype(x_MI.dtype).name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{operation}: x must be float32, bfloat16 or float16, got {x_MI.dtype}. Cast it first.")
    if not x_MI.ndim or x_MI.shape[-1] != weight.in_features:
        raise ValueError(
            f"{operation}: x has shape {tuple(x_MI.shape)}, its last dimension must be in_features = "
            f"{weight.in_features}."
        )
    if len(weight.stack) > 1:
        raise ValueError(f"{operation}: the weight has stack {weight.stack}, at most one stack axis is supported.")
    if weight.stack and layer is None:
        raise ValueError(f"{operation}: the weight is a stack of {weight.stack[0]} matrices, give layer=.")
    if layer is not None and not weight.stack:
        raise ValueError(f"{operation}: layer={layer} given for a single matrix, leave it out.")
    if isinstance(layer, int) and not 0 <= layer < weight.stack[0]:
        raise ValueError(f"{operation}: layer={layer} is outside the stack of {weight.stack[0]} matrices.")
    one = (weight.out_features,)
    if bias_O is not None and tuple(bias_O.shape) not in (one, (*weight.stack, *one)):
        raise ValueError(
            f"{operation}: bias has shape {tuple(bias_O.shape)}, expected {one}"
            + (f" or {(*weight.stack, *one)}." if weight.stack else ".")
        )
    return tuple(x_MI.shape[:-1])
