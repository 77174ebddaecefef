"""GPTQ (Frantar et al., 2022, arXiv:2210.17323) on one matrix: weights and the second moments of its inputs.

Minimises tr((Q − W)ᵀ H (Q − W)), the error of the outputs over the calibration tokens, row by row of W [in, out]. With
H = AᵀA, A lower triangular, row j's share of the error is (A[j, j] · d_j + Σ_{i<j} A[j, i] · d_i)² for d = Q − W, so
that row j is rounded to the grid point nearest to w_j − Σ_{i<j} A[j, i] / A[j, j] · d_i. These are GPTQ's numbers; the
paper pushes every error into all later rows through a factor of H⁻¹, here each row pulls, and H is never inverted.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.layout import BITS
from qwen_jax.quantize.assembly import Places, assembled
from qwen_jax.quantize.grids import HALF_MAX, PRECISION, Grid, find_grid, round_onto, static_grids

logger = logging.getLogger("qwen_jax")

BLOCK = 32  # rows whose mutual corrections are made one by one; those of earlier rows come in one product
AUTOGPTQ_BLOCK = 128  # rows after which AutoGPTQ's errors reach the weights that it takes scales from
LARGEST_DAMP = 1.0

ORDERS = ("natural", "activation", "group_aware")


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
    if not bool(jnp.isfinite(hessian_II).all()):
        raise ValueError(f"{where}: NaN or infinity in the activations; check the weights of the layers before it.")
    if cross_IO is not None and not bool(jnp.isfinite(cross_IO).all()):
        raise ValueError(f"{where}: NaN or infinity in the activations of the float model; check the layers before it.")
    if not bool(jnp.isfinite(weight_IO).all()):
        raise ValueError(f"{where}: NaN or infinity in the weights; check the checkpoint.")
    if float(jnp.abs(weight_IO).max()) / ((1 << settings.bits) - 1) > HALF_MAX / 4:
        raise ValueError(f"{where}: weights reach {float(jnp.abs(weight_IO).max()):g}, too large for float16 scales.")

    plan = _Plan.make(np.asarray(jnp.diagonal(hessian_II), np.float64), settings, block)
    lower_II, loading_I, damp = _factor(hessian_II, plan.order_I, settings.damp, where)
    target_IO = weight_IO
    if cross_IO is not None:
        target_IO = _moved(
            weight_IO, lower_II, loading_I, plan.order_I, cross_IO, float(jnp.diagonal(hessian_II).mean())
        )
    grid = Grid(settings.bits, settings.sym, settings.scale_search, settings.smallest_zero)

    behind = 0 if settings.scale_search or AUTOGPTQ_BLOCK % plan.chunk else AUTOGPTQ_BLOCK
    padded = -(-len(plan.row_R) // behind) * behind if behind else len(plan.row_R)
    place_I = jnp.asarray(plan.place_I)
    lower_RR, loading_R, target_RO = lower_II, loading_I, target_IO[plan.order_I]
    if padded > in_features:
        lower_RR = jnp.zeros((padded, padded)).at[place_I[:, None], place_I].set(lower_II)
        loading_R = jnp.zeros(padded).at[place_I].set(loading_I)
        target_RO = jnp.zeros((padded, target_IO.shape[1])).at[place_I].set(target_RO)
    static = None
    if settings.static_groups and plan.groups > 1:
        loading_of_row_I = jnp.zeros(in_features).at[plan.order_I].set(loading_I)
        static = static_grids(target_IO, loading_of_row_I, plan.groups, plan.group_size, grid)
        static = (*static, jnp.asarray(np.maximum(plan.row_R, 0) // plan.group_size))
    q_RO, scales_CO, zeros_CO = _solve(
        target_RO, lower_RR, loading_R, static, chunk=plan.chunk, step=plan.step, grid=grid, behind=behind
    )
    if static is not None:
        scales_CO, zeros_CO = static[:2]
    packed, scales, zeros, quantized_IO = assembled(q_RO, scales_CO, zeros_CO, plan.places(), bits=settings.bits)
    packed, scales, zeros = jax.device_get((packed, scales, None if settings.sym else zeros))
    tensor = QuantizedTensor(
        packed,
        scales,
        zeros,
        plan.permutation,
        bits=settings.bits,
        group_size=plan.group_size,
        in_features=in_features,
    )
    return QuantizedMatrix(tensor, quantized_IO, float(relative_error(quantized_IO, target_IO, hessian_II)), damp)


@jax.jit
def relative_error(quantized_IO, weight_IO, hessian_II):
    """tr((Q − W)ᵀ H (Q − W)) / tr(Wᵀ H W): the squared error of the outputs, relative to the outputs."""

    def square(x_IO):
        return jnp.vdot(x_IO, jnp.dot(hessian_II, x_IO, precision=PRECISION))

    return square(quantized_IO - weight_IO) / jnp.maximum(square(weight_IO), jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The order of the rows, cut into chunks that share a grid and are padded to whole steps.

    Attributes:
        order_I: rows of the matrix in the order of rounding.
        row_R: the same with −1 where a chunk is padded, [chunks · chunk].
        place_I: where in row_R each of order_I stands.
        chunk: padded rows of a chunk: a group, or with static groups any number of rows.
        step: rows of a block; divides chunk.
        group_C: the group that each chunk is; None where chunks are no groups (static).
        permutation: as in `QuantizedTensor`.
        group_size: true rows of a group.
        groups: their number.
    """

    order_I: np.ndarray
    row_R: np.ndarray
    place_I: np.ndarray
    chunk: int
    step: int
    group_C: np.ndarray | None
    permutation: np.ndarray | None
    group_size: int
    groups: int

    @classmethod
    def make(cls, diagonal_I: np.ndarray, settings: MatrixSettings, block: int) -> "_Plan":
        in_features = len(diagonal_I)
        group_size = in_features if settings.group_size == -1 else min(settings.group_size, in_features)
        groups = -(-in_features // group_size)
        static = settings.static_groups and groups > 1
        natural = [
            np.arange(start, min(start + group_size, in_features)) for start in range(0, in_features, group_size)
        ]
        group_C = np.arange(groups)
        if settings.order == "natural":
            order_I = np.arange(in_features)
        elif settings.order == "activation" or groups == 1:
            order_I = np.argsort(-diagonal_I, kind="stable")
        else:
            group_C = np.argsort([-diagonal_I[rows].max() for rows in natural], kind="stable")
            inner = [natural[group][np.argsort(-diagonal_I[natural[group]], kind="stable")] for group in group_C]
            order_I = np.concatenate(inner)
        rows = min(block, in_features) if static else group_size
        step = -(-rows // -(-rows // block))
        chunk = -(-rows // step) * step
        if static:
            sizes = [min(rows, in_features - start) for start in range(0, in_features, rows)]
        else:
            sizes = [len(natural[group]) for group in group_C]
            if settings.order == "activation":  # groups are formed along the order
                sizes = [len(part) for part in natural]
        row_R = np.full(len(sizes) * chunk, -1)
        starts = np.repeat(np.arange(len(sizes)) * chunk - np.cumsum([0, *sizes[:-1]]), sizes)
        place_I = np.arange(in_features) + starts
        row_R[place_I] = order_I
        moved = settings.order == "activation" and groups > 1 and not static
        permutation = order_I.astype(np.int32) if moved else None
        return cls(order_I, row_R, place_I, chunk, step, None if static else group_C, permutation, group_size, groups)

    def places(self) -> Places:
        """Where the stored rows and groups are."""
        row_I, natural_I = self.place_I, None
        if self.permutation is None:
            row_I = np.empty_like(self.place_I)
            row_I[self.order_I] = self.place_I
        else:
            natural_I = np.argsort(self.permutation)
        chunk_G = np.arange(self.groups) if self.group_C is None else np.argsort(self.group_C)
        return Places(row_I, chunk_G, np.arange(len(row_I)) // self.group_size, natural_I)


# -- the factor of H -------------------------------------------------------------------------------------------------


@jax.jit
def _cholesky(hessian_II, order_I, damp):
    """A of H / mean(diag H) + damp = AᵀA in the order given, as (A / diag A, strictly lower; diag(A)²)."""
    diagonal_I = jnp.diagonal(hessian_II)
    mean = diagonal_I.mean()
    ordered_II = hessian_II[order_I][:, order_I] / jnp.where(mean > 0, mean, 1.0)
    ordered_II = ordered_II + damp * jnp.eye(len(diagonal_I))
    # Cholesky of the reversed matrix, reversed, is the upper factor of H = R Rᵀ; A = Rᵀ.
    lower_II = jnp.linalg.cholesky(ordered_II[::-1, ::-1])[::-1, ::-1].T
    diagonal_I = jnp.diagonal(lower_II)
    return jnp.tril(lower_II / diagonal_I[:, None], -1), diagonal_I**2


def _factor(hessian_II, order_I, damp: float, where: str):
    """The factor with the least of damp, 2 damp, 4 damp … that works; H all zero (nothing reached it) has damp 1."""
    wanted = damp
    if not float(jnp.diagonal(hessian_II).mean()) > 0:
        damp = LARGEST_DAMP
    while True:
        lower_II, loading_I = _cholesky(hessian_II, jnp.asarray(order_I), damp)
        if bool(jnp.isfinite(lower_II).all()) and bool((loading_I > 0).all()):
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


@jax.jit
def _moved(weight_IO, lower_II, loading_I, order_I, cross_IO, mean):
    """W + (H + damp)⁻¹ · cross, by the factor: (DA)ᵀ(DA) with D² = loading."""
    order_I = jnp.asarray(order_I)
    factor_II = (lower_II + jnp.eye(len(order_I))) * jnp.sqrt(loading_I)[:, None]
    solve = functools.partial(jax.scipy.linalg.solve_triangular, factor_II, lower=True)
    right_IO = jnp.asarray(cross_IO, jnp.float32)[order_I] / jnp.where(mean > 0, mean, 1.0)
    move_IO = solve(solve(right_IO, trans="T"), trans="N")
    return weight_IO.at[order_I].add(move_IO)


# -- rounding --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("chunk", "step", "grid", "behind"))
def _solve(target_RO, lower_RR, loading_R, static, *, chunk: int, step: int, grid: Grid, behind: int):
    """Integers [R, out], and each chunk's scales and zero-points [chunks, out].

    Args:
        target_RO: rows in the order of rounding.
        lower_RR: A / diag(A), strictly lower, in that order; zero for padding.
        loading_R: diag(A)²; zero for padding.
        static: (scales [groups, out], zeros [groups, out], group of each row [R]), or None: each chunk finds its own.
        chunk: rows of a chunk.
        step: rows of a block.
        grid: what grids may be.
        behind: 0, or rows of a block (whole chunks) whose own errors its chunks' grids do not see.
    """
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
