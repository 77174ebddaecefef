"""AutoGPTQ's and GPTQModel's tensors ↔ `QuantizedTensor`.

A module in the file: `qweight` int32 [ceil(in·bits/32), out] (a bit stream down each column), `qzeros` int32 [groups,
ceil(out·bits/32)] (a bit stream along each row), `scales` [groups, out], and perhaps `g_idx` int32 [in], each input's
group. Zero-points are stored minus 1 in checkpoint_format "gptq" (v1), as they are in "gptq_v2" and "gptq_p" (whose
words at 2, 4 and 8 bits are the same). With act-order (a `g_idx` that is not sorted) our rows are sorted by group.
"""

import logging
from collections.abc import Mapping

import numpy as np

from converters.safetensors_files import Runs, at_runs, length
from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from qwen_jax.config import QuantizationConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.quantization_config import ModuleSettings

logger = logging.getLogger("qwen_jax")

PACKED, SCALES = "qweight", "scales"


def required(settings: ModuleSettings) -> tuple[str, ...]:
    """Tensors that a module must have."""
    del settings
    return PACKED, "qzeros", SCALES


def group_size_and_count(settings: ModuleSettings, in_features: int) -> tuple[int, int]:
    """The true group size (in_features for −1 and for anything larger) and ceil(in_features / group size)."""
    whole = settings.group_size == -1 or settings.group_size >= in_features
    group_size = in_features if whole else settings.group_size
    return group_size, -(-in_features // group_size)


def shapes(settings: ModuleSettings, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """The shape that each of a module's tensors must have."""
    _, groups = group_size_and_count(settings, in_features)
    return {
        "qweight": (layout.words(in_features, settings.bits), out_features),
        "qzeros": (groups, layout.words(out_features, settings.bits)),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
    }


def read_zeros(
    parts: Mapping[str, np.ndarray], settings: ModuleSettings, config: QuantizationConfig, out_features: int, where: str
) -> tuple[np.ndarray | None, str]:
    """The zero-points, uint8 [groups, out], None if every one is 2^(bits − 1); and the convention they were stored in.

    A file that calls itself symmetric and stores one number everywhere tells its convention by that number, whatever
    its label says: 2^(bits − 1) is the zero-point itself, 2^(bits − 1) − 1 the zero-point minus 1.
    """
    words, bits = parts["qzeros"], settings.bits
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    stored = layout.unpack(words.T, bits, out_features).T
    convention = "v1" if config.checkpoint_format == "gptq" else "v2"
    if settings.sym is not False:
        by_data = (
            {middle: "v2", middle - 1: "v1"}.get(int(stored.flat[0])) if (stored == stored.flat[0]).all() else None
        )
        if by_data not in (None, convention):
            logger.warning(
                "%s.qzeros: every stored value is %d, so this symmetric module's zero-points are stored %s, although "
                "checkpoint_format is %r; read so.",
                where,
                stored.flat[0],
                "as they are" if by_data == "v2" else "minus 1",
                config.checkpoint_format,
            )
        convention = by_data or convention
    if convention == "v1":
        if (stored == top).any() and _borrows(config, bits):
            stored = layout.unpack((words.view(np.uint32) + _ones(bits)).view(np.int32).T, bits, out_features).T
        else:
            stored = (stored + 1) & top
    return (None if (stored == middle).all() else np.ascontiguousarray(stored)), convention


def _borrows(config: QuantizationConfig, bits: int) -> bool:
    # GPTQModel subtracts 1 from all fields of a word at once, so that a zero-point of 0 borrows from its neighbour
    # (its model.py, convert_gptq_v2_to_v1_format_module); at 3 bits, and in other tools, each field wraps by itself.
    return "gptqmodel" in config.quantizer and bits != 3


def _ones(bits: int) -> np.uint32:
    return np.uint32(sum(1 << shift for shift in range(0, 32, bits)))


def read_permutation(
    parts: Mapping[str, np.ndarray], settings: ModuleSettings, in_features: int, where: str
) -> np.ndarray | None:
    """The input that each row, sorted by group, multiplies: int32 [in]; None for the natural order.

    Raises:
        CheckpointError: if `g_idx` does not put group_size inputs into each group (the rest into the last).
    """
    if (index := parts.get("g_idx")) is None:
        if settings.desc_act:
            logger.info("%s: has no g_idx although desc_act is true; inputs are in their natural order.", where)
        return None
    group_size, groups = group_size_and_count(settings, in_features)
    natural = np.arange(in_features) // group_size
    if np.array_equal(index, natural):
        return None
    if groups > 1 and not index.any():
        logger.warning("%s.g_idx: is all zero although there are %d groups; taken as the natural order.", where, groups)
        return None
    if groups == 1 and (index == index[0]).all():
        return None
    permutation = np.argsort(index, kind="stable").astype(np.int32)
    if not np.array_equal(index[permutation], natural):
        sizes = np.bincount(index) if index.min() >= 0 else []
        raise CheckpointError(
            f"{where}.g_idx: holds groups {index.min()} to {index.max()}"
            + (f" of {min(sizes)} to {max(sizes)} inputs" if len(sizes) else "")
            + f", expected {groups} groups of {group_size} (the last one of the rest); group_size comes from "
            f"{settings.rule}."
        )
    return permutation


def reorder(
    packed: np.ndarray, permutation: np.ndarray | None, bits: int, in_features: int, rows: Runs | None = None
) -> np.ndarray:
    """Packed rows in the order of `permutation`: new row r is old row permutation[r].

    With `rows` those new rows alone, of old ones that lie at `scattered(permutation, rows, bits)`.
    """
    if permutation is None:
        return packed
    if rows is None:
        return layout.pack(layout.unpack(packed, bits, in_features)[permutation], bits)
    there = at_runs(np.arange(in_features), scattered(permutation, rows, bits), 0)
    place = np.searchsorted(there, at_runs(permutation, rows, 0))
    return layout.pack(layout.unpack(packed, bits, len(there))[place], bits)


def scattered(permutation: np.ndarray, rows: Runs, bits: int) -> Runs:
    """The old rows, in whole words, among which the new `rows` of an act-order lie."""
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    blocks = np.unique(at_runs(permutation, rows, 0) // unit)
    ends = np.flatnonzero(np.diff(blocks) > 1)
    starts, stops = blocks[[0, *(ends + 1)]] * unit, (blocks[[*ends, -1]] + 1) * unit
    stops = np.minimum(stops, len(permutation))
    return tuple(slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def boxes(settings: ModuleSettings, rows: Runs | None, columns: Runs | None) -> dict[str, tuple]:
    """Which rows and columns of a module's tensors hold these of the matrix; other tensors are small, and read whole.

    Args:
        settings: of the module.
        rows: whole words and groups of the matrix's rows, in the file's order; None for all, as the next.
        columns: of the matrix.
    """
    return {PACKED: (divided(rows, 32, settings.bits), columns), SCALES: (groups_of(rows, settings), columns)}


def divided(rows: Runs | None, by: int, times: int = 1) -> Runs | None:
    """Runs in larger units, the last one rounded up."""
    if rows is None:
        return None
    return tuple(slice(run.start * times // by, -(-run.stop * times // by)) for run in rows)


def groups_of(rows: Runs | None, settings: ModuleSettings) -> Runs | None:
    """The groups of these rows."""
    return divided(rows, settings.group_size) if settings.group_size > 0 else None


def read(
    parts: Mapping[str, np.ndarray],
    settings: ModuleSettings,
    config: QuantizationConfig,
    in_features: int,
    where: str,
    rows: Runs | None = None,
    columns: Runs | None = None,
    out_features: int | None = None,
) -> QuantizedTensor:
    """A module's tensors, or the boxes of them that `boxes` tells, as a NumPy `QuantizedTensor` in layout "gptq".

    Args:
        parts: the file's arrays by the last part of their name, of the shapes that `shapes` gives.
        settings: of this module.
        config: of the checkpoint.
        in_features: rows of the whole matrix.
        where: begins messages: file and module.
        rows: those that the parts hold, None for all; of act-order, sorted ones, their words as `scattered` tells.
        columns: likewise.
        out_features: columns of the whole matrix; needed with `columns`.

    Raises:
        CheckpointError: if `g_idx` contradicts the settings.
    """
    width: int = out_features or parts["scales"].shape[1]
    zeros, _ = read_zeros(parts, settings, config, width, where)
    permutation = read_permutation(parts, settings, in_features, where)
    packed = reorder(parts["qweight"], permutation, settings.bits, in_features, rows)
    group_size, _ = group_size_and_count(settings, in_features)
    zeros = part_of_zeros(zeros, settings, rows, columns)
    permutation = None if permutation is None else at_runs(permutation, rows, 0)
    in_features = in_features if rows is None else length(rows)
    return QuantizedTensor(packed, parts["scales"], zeros, permutation, settings.bits, group_size, in_features)


def part_of_zeros(zeros, settings: ModuleSettings, rows: Runs | None, columns: Runs | None) -> np.ndarray | None:
    """The zero-points of these rows and columns."""
    return None if zeros is None else at_runs(at_runs(zeros, groups_of(rows, settings), 0), columns, 1)


def natural_order(weight: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """The packed words with rows in the order of the inputs, and `g_idx`, each input's group.

    Raises:
        ValueError: for a stacked or prepacked tensor.
    """
    if weight.layout != "gptq" or weight.stack:
        raise ValueError(f"layout {weight.layout!r} of stack {weight.stack}: expected one matrix in layout 'gptq'.")
    group_I = np.arange(weight.in_features, dtype=np.int32) // np.int32(weight.group_size)
    packed = np.asarray(weight.packed)
    if weight.permutation is None:
        return packed, group_I
    inverse = np.argsort(np.asarray(weight.permutation))
    return reorder(packed, inverse, weight.bits, weight.in_features), group_I[inverse]


def zeros_of(weight: QuantizedTensor) -> np.ndarray:
    """The zero-points, uint8 [groups, out], written out where the tensor has None."""
    if weight.zeros is None:
        return np.full(weight.scales.shape, 1 << (weight.bits - 1), np.uint8)
    return np.asarray(weight.zeros)


def write(weight: QuantizedTensor, config: QuantizationConfig) -> dict[str, np.ndarray]:
    """The inverse of `read`: qweight, qzeros, scales and g_idx, C-contiguous.

    `config` says in which convention zero-points are stored. v1 has no place for a zero-point of 0: it wraps (borrows,
    in a file of GPTQModel), as those tools' readers undo, and is logged.

    Raises:
        ValueError: for a stacked or prepacked tensor.
    """
    packed, g_idx = natural_order(weight)
    zeros, bits = zeros_of(weight), weight.bits
    minus_one = config.checkpoint_format == "gptq"
    borrow = minus_one and _borrows(config, bits)
    if minus_one and not zeros.all():
        logger.warning("A zero-point of 0 in checkpoint_format 'gptq': some readers take it for 2^bits; use gptq_v2.")
    stored = zeros if borrow or not minus_one else (zeros - 1) & ((1 << bits) - 1)
    qzeros = np.ascontiguousarray(layout.pack(stored.T, bits).T)
    if borrow:
        qzeros = (qzeros.view(np.uint32) - _ones(bits)).view(np.int32)
    parts = {"qweight": packed, "qzeros": qzeros, "scales": np.asarray(weight.scales), "g_idx": g_idx}
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}
