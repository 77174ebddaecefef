"""GPTQ (Frantar et al., 2022, arXiv:2210.17323) on one matrix: weights and the second moments of its inputs.

Minimises tr((Q − W)ᵀ H (Q − W)), the error of the outputs over the calibration tokens, row by row of W [in, out]. With
H = AᵀA, A lower triangular, row j's share of the error is (A[j, j] · d_j + Σ_{i<j} A[j, i] · d_i)² for d = Q − W, so
that row j is rounded to the grid point nearest to w_j − Σ_{i<j} A[j, i] / A[j, j] · d_i. These are GPTQ's numbers; the
paper pushes every error into all later rows through a factor of H⁻¹, here each row pulls, and H is never inverted.
"""

import dataclasses
import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.layout import BITS
from qwen_jax.quantize.assembly import assembled
from qwen_jax.quantize.grids import HALF_MAX, PRECISION, Grid, find_grid, round_onto, static_grids
from qwen_jax.quantize.order import ORDERS, Plan

logger = logging.getLogger("qwen_jax")

BLOCK = 32  # rows whose mutual corrections are made one by one; those of earlier rows come in one product
AUTOGPTQ_BLOCK = 128  # rows after which AutoGPTQ's errors reach the weights that it takes scales from
LARGEST_DAMP = 1.0


@dataclasses.dataclass(frozen=True)
class MatrixSettings:
    """How one matrix is quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; −1 for all of them. The last group may be short.
        sym: one zero-point, 2^(bits − 1), for all groups; else each group and output has its own.
        order: in which rows are rounded, the most active first being the better: "natural"; "activation" (act-order:
            groups are formed along that order, which costs a gather at run time); "group_aware" (rows move inside
            their groups, and groups as wholes: nothing to pay at run time).
        static_groups: scales from the weights as they are, before any rounding; act-order then leaves groups alone.
        damp: part of H's mean diagonal that is added to its diagonal; raised by itself when that is not enough.
        scale_search: choose each scale by the squared error it makes, weighted by what an error of the row costs, else
            from the group's extremes as AutoGPTQ does, whose groups of fewer than 128 rows do not see the errors made
            in their own block of 128.
        smallest_zero: lowest zero-point of an asymmetric grid: 1 where the file stores zero-points minus 1.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    order: str = "group_aware"
    static_groups: bool = False
    damp: float = 0.01
    scale_search: bool = True
    smallest_zero: int = 1

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}, expected one of {BITS}.")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}, expected −1 (one group a column) or at least 1.")
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}, expected one of {ORDERS}.")
        if not 0 <= self.damp < LARGEST_DAMP:
            raise ValueError(f"damp is {self.damp}, expected at least 0 and below {LARGEST_DAMP:g}.")


@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """The result of `quantize_matrix`.

    Attributes:
        tensor: NumPy leaves, float16 scales, layout "gptq".
        weight_IO: what the tensor means, float32 [in, out].
        error: tr(DᵀHD) / tr(WᵀHW), the relative squared error of the outputs on the calibration data.
        damp: the damping that was needed.
    """

    tensor: QuantizedTensor
    weight_IO: jax.Array
    error: float
    damp: float


def quantize_matrix(
    weight_IO, hessian_II, settings: MatrixSettings, *, cross_IO=None, where: str = "weight", block: int = BLOCK
) -> QuantizedMatrix:
    """Rounds a matrix so that its outputs change least on the data behind `hessian_II`.

    Args:
        weight_IO: [in, out], finite.
        hessian_II: [in, in], mean of x xᵀ over the calibration tokens, float32 or better.
        settings: grid, order and damping.
        cross_IO: [in, out], mean of x rᵀ where r is what the output should gain over x W, because the inputs x come
            from layers that are quantized already: W is first moved to W + (H + damp)⁻¹ · cross. None for no such move.
        where: begins messages: layer and module.
        block: rows in a block; changes speed and the last bits of sums, nothing else.

    Raises:
        ValueError: non-finite input, weights too large for float16 scales, or an H that no damping makes positive
            definite; named by `where`.
    """
    weight_IO = jnp.asarray(weight_IO, jnp.float32)
    in_features = len(weight_IO)
    hessian_II = jnp.asarray(hessian_II, jnp.float32)
    if hessian_II.shape != (in_features, in_features):
        raise ValueError(f"{where}: H has shape {hessian_II.shape}, expected {(in_features, in_features)}.")
    facts = jax.device_get(_facts(weight_IO, hessian_II, cross_IO))
    if not facts["hessian"]:
        raise ValueError(f"{where}: NaN or infinity in the activations; check the weights of the layers before it.")
    if not facts["cross"]:
        raise ValueError(f"{where}: NaN or infinity in the activations of the float model; check the layers before it.")
    if not facts["weight"]:
        raise ValueError(f"{where}: NaN or infinity in the weights; check the checkpoint.")
    if facts["largest"] / ((1 << settings.bits) - 1) > HALF_MAX / 4:
        raise ValueError(f"{where}: weights reach {facts['largest']:g}, too large for float16 scales.")

    plan = Plan.make(facts["diagonal"].astype(np.float64), settings, block)
    lower_II, loading_I, damp = _factor(hessian_II, plan.order_I, settings.damp, bool(facts["diagonal"].any()), where)
    behind = 0 if settings.scale_search or AUTOGPTQ_BLOCK % plan.chunk else AUTOGPTQ_BLOCK
    padded = -(-len(plan.row_R) // behind) * behind if behind else len(plan.row_R)
    static = plan.static and plan.groups > 1
    shape = _Shape(plan.chunk, plan.step, behind, padded, plan.group_size, plan.groups if static else None)
    grid = Grid(settings.bits, settings.sym, settings.scale_search, settings.smallest_zero)
    row_R = np.maximum(plan.row_R, 0) if static else None
    packed, scales, zeros, quantized_IO, error = _rounded(
        *(weight_IO, hessian_II, cross_IO, lower_II, loading_I),
        *(plan.order_I, plan.place_I, row_R, plan.places()),
        shape=shape,
        grid=grid,
    )
    packed, scales, zeros, error = jax.device_get((packed, scales, None if settings.sym else zeros, error))
    tensor = QuantizedTensor(
        packed,
        scales,
        zeros,
        plan.permutation,
        bits=settings.bits,
        group_size=plan.group_size,
        in_features=in_features,
    )
    return QuantizedMatrix(tensor, quantized_IO, float(error), damp)


@jax.jit
def _facts(weight_IO, hessian_II, cross_IO):
    """What has to be known before the first step: whether all is finite, and H's diagonal."""
    return {
        "hessian": jnp.isfinite(hessian_II).all(),
        "weight": jnp.isfinite(weight_IO).all(),
        "cross": True if cross_IO is None else jnp.isfinite(cross_IO).all(),
        "largest": jnp.abs(weight_IO).max(),
        "diagonal": jnp.diagonal(hessian_II),
    }


def _relative_error(quantized_IO, weight_IO, hessian_II):
    """tr((Q − W)ᵀ H (Q − W)) / tr(Wᵀ H W): the squared error of the outputs, relative to the outputs."""

    def square(x_IO):
        return jnp.vdot(x_IO, jnp.dot(hessian_II, x_IO, precision=PRECISION))

    return square(quantized_IO - weight_IO) / jnp.maximum(square(weight_IO), jnp.finfo(jnp.float32).tiny)


# -- the factor of H -------------------------------------------------------------------------------------------------


@jax.jit
def _cholesky(hessian_II, order_I, damp):
    """A of H / mean(diag H) + damp = AᵀA in the order given: (A / diag A, strictly lower; diag(A)²; whether it is)."""
    diagonal_I = jnp.diagonal(hessian_II)
    mean = diagonal_I.mean()
    ordered_II = hessian_II[order_I][:, order_I] / jnp.where(mean > 0, mean, 1.0)
    ordered_II = ordered_II + damp * jnp.eye(len(diagonal_I))
    # Cholesky of the reversed matrix, reversed, is the upper factor of H = R Rᵀ; A = Rᵀ.
    lower_II = jnp.linalg.cholesky(ordered_II[::-1, ::-1])[::-1, ::-1].T
    diagonal_I = jnp.diagonal(lower_II)
    lower_II, loading_I = jnp.tril(lower_II / diagonal_I[:, None], -1), diagonal_I**2
    return lower_II, loading_I, jnp.isfinite(lower_II).all() & (loading_I > 0).all()


def _factor(hessian_II, order_I, damp: float, reached: bool, where: str):
    """The factor with the least of damp, 2 damp, 4 damp … that works; H all zero (nothing reached it) has damp 1."""
    wanted = damp
    if not reached:
        damp = LARGEST_DAMP
    while True:
        lower_II, loading_I, works = _cholesky(hessian_II, order_I, damp)
        if works:
            break
        if damp >= LARGEST_DAMP:
            raise ValueError(
                f"{where}: H is not positive definite with {damp:g} of its mean diagonal added; expected at most "
                f"{LARGEST_DAMP:g} to be enough. Give more calibration data, or exclude the module."
            )
        damp = min(max(2 * damp, 0.0025), LARGEST_DAMP)
    if damp != wanted:
        logger.warning("%s: damping raised from %g to %g of H's mean diagonal.", where, wanted, damp)
    return lower_II, loading_I, damp


def _moved(weight_IO, lower_II, loading_I, order_I, cross_IO, mean):
    """W + (H + damp)⁻¹ · cross, by the factor: (DA)ᵀ(DA) with D² = loading."""
    factor_II = (lower_II + jnp.eye(len(order_I))) * jnp.sqrt(loading_I)[:, None]
    solve = functools.partial(jax.scipy.linalg.solve_triangular, factor_II, lower=True)
    right_IO = jnp.asarray(cross_IO, jnp.float32)[order_I] / jnp.where(mean > 0, mean, 1.0)
    move_IO = solve(solve(right_IO, trans="T"), trans="N")
    return weight_IO.at[order_I].add(move_IO)


# -- rounding --------------------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """What the program of a matrix depends on beside its size.

    Attributes:
        chunk: rows of a chunk.
        step: rows of a block.
        behind: 0, or rows of a block (whole chunks) whose own errors its chunks' grids do not see.
        padded: rows in all.
        group_size: rows of a group.
        static_groups: their number where all scales are found before any rounding; else None: each chunk finds its own.
    """

    chunk: int
    step: int
    behind: int
    padded: int
    group_size: int
    static_groups: int | None


@functools.partial(jax.jit, static_argnames=("shape", "grid"))
def _rounded(
    weight_IO, hessian_II, cross_IO, lower_II, loading_I, order_I, place_I, row_R, places, *, shape: _Shape, grid: Grid
):
    """What `assembled` gives, and the relative error; all of a matrix after the factor, as one program."""
    target_IO = weight_IO
    if cross_IO is not None:
        mean = jnp.diagonal(hessian_II).mean()
        target_IO = _moved(weight_IO, lower_II, loading_I, order_I, cross_IO, mean)
    lower_RR, loading_R, target_RO = lower_II, loading_I, target_IO[order_I]
    if shape.padded > len(order_I):
        lower_RR = jnp.zeros((shape.padded, shape.padded)).at[place_I[:, None], place_I].set(lower_II)
        loading_R = jnp.zeros(shape.padded).at[place_I].set(loading_I)
        target_RO = jnp.zeros((shape.padded, target_IO.shape[1])).at[place_I].set(target_RO)
    static = None
    if shape.static_groups is not None:
        loading_of_row_I = jnp.zeros(len(order_I)).at[order_I].set(loading_I)
        static = static_grids(target_IO, loading_of_row_I, shape.static_groups, shape.group_size, grid)
        static = (*static, row_R // shape.group_size)
    q_RO, scales_CO, zeros_CO = _solve(target_RO, lower_RR, loading_R, static, shape, grid)
    if static is not None:
        scales_CO, zeros_CO = static[:2]
    *parts, quantized_IO = assembled(q_RO, scales_CO, zeros_CO, places, bits=grid.bits)
    return *parts, quantized_IO, _relative_error(quantized_IO, target_IO, hessian_II)


def _solve(target_RO, lower_RR, loading_R, static, shape: _Shape, grid: Grid):
    """Integers [R, out], and each chunk's scales and zero-points [chunks, out].

    Args:
        target_RO: rows in the order of rounding.
        lower_RR: A / diag(A), strictly lower, in that order; zero for padding.
        loading_R: diag(A)²; zero for padding.
        static: (scales [groups, out], zeros [groups, out], group of each row [R]), or None.
        shape: see `_Shape`.
        grid: what grids may be.
    """
    chunk, step, behind = shape.chunk, shape.step, shape.behind
    R, out_features = target_RO.shape
    chunks = R // chunk

    def pull(lower_rR, error_RO):
        return jnp.dot(lower_rR, error_RO, precision=PRECISION)

    def one_chunk(c, carry):
        error_RO, q_RO, scales_CO, zeros_CO = carry
        start = c * chunk
        target_rO = lax.dynamic_slice(target_RO, (start, 0), (chunk, out_features))
        if static is None:
            expected_rO = target_rO
            if chunks > 1:  # where the rows of this chunk would best stand, given the errors made so far
                rows = behind or chunk
                first = start // rows * rows
                lower_sR = lax.dynamic_slice(lower_RR, (first, 0), (rows, R))
                inside_ss = lax.dynamic_slice(lower_sR, (0, first), (rows, rows))
                before_RO = jnp.where((jnp.arange(R) < first)[:, None], error_RO, 0.0)
                move_sO = jax.scipy.linalg.solve_triangular(
                    inside_ss, pull(lower_sR, before_RO), lower=True, unit_diagonal=True
                )
                expected_rO = target_rO - lax.dynamic_slice(move_sO, (start - first, 0), (chunk, out_features))
            loading_r = lax.dynamic_slice(loading_R, (start,), (chunk,))
            scale_O, zero_O = find_grid(expected_rO, loading_r, grid)
            scales_CO, zeros_CO = scales_CO.at[c].set(scale_O), zeros_CO.at[c].set(zero_O)
            rows_scale_rO, rows_zero_rO = scale_O[None], zero_O[None]
        else:
            group_r = lax.dynamic_slice(static[2], (start,), (chunk,))
            rows_scale_rO, rows_zero_rO = static[0][group_r], static[1][group_r]

        def one_block(b, carry):
            error_RO, q_RO = carry
            first = start + b * step
            lower_bR = lax.dynamic_slice(lower_RR, (first, 0), (step, R))
            inside_bb = lax.dynamic_slice(lower_bR, (0, first), (step, step))
            aim_bO = lax.dynamic_slice(target_RO, (first, 0), (step, out_features)) - pull(lower_bR, error_RO)

            def one_row(j, carry):
                error_bO, q_bO = carry
                at = 0 if static is None else b * step + j
                scale_O, zero_O = rows_scale_rO[at], rows_zero_rO[at]
                weight_O = target_RO[first + j]
                aim_O = aim_bO[j] - pull(inside_bb[j], error_bO)
                q_O = round_onto(aim_O, scale_O, zero_O, grid.top)
                return error_bO.at[j].set(scale_O * (q_O - zero_O) - weight_O), q_bO.at[j].set(q_O)

            zeros_bO = jnp.zeros((step, out_features))
            error_bO, q_bO = lax.fori_loop(0, step, one_row, (zeros_bO, zeros_bO))
            return (
                lax.dynamic_update_slice(error_RO, error_bO, (first, 0)),
                lax.dynamic_update_slice(q_RO, q_bO.astype(jnp.uint8), (first, 0)),
            )

        error_RO, q_RO = lax.fori_loop(0, chunk // step, one_block, (error_RO, q_RO))
        return error_RO, q_RO, scales_CO, zeros_CO

    empty_CO = jnp.zeros((chunks, out_features))
    carry = (jnp.zeros_like(target_RO), jnp.zeros(target_RO.shape, jnp.uint8), empty_CO, empty_CO)
    _, q_RO, scales_CO, zeros_CO = lax.fori_loop(0, chunks, one_chunk, carry)
    return q_RO, scales_CO, zeros_CO
