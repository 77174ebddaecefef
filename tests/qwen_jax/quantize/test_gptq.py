"""GPTQ against the paper's algorithm written out in NumPy float64, column by column with the inverse of H."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax.quantize.gptq import MatrixSettings, quantize_matrix
from qwen_jax.quantize.round_to_nearest import round_to_nearest


def correlated(tokens=512, in_features=96, out_features=24, seed=0):
    """Inputs with a mean, correlations and very different sizes; weights; H."""
    rng = np.random.default_rng(seed)
    mix_II = rng.normal(size=(in_features, in_features)) / np.sqrt(in_features) + np.eye(in_features)
    size_I = np.exp(rng.normal(size=in_features))
    x_TI = (rng.normal(size=(tokens, in_features)) @ mix_II + 0.3) * size_I
    weight_IO = rng.normal(size=(in_features, out_features)) * 0.1 + 0.02
    return x_TI, weight_IO, x_TI.T @ x_TI / tokens


def span_grid(weight_RO, bits, sym, smallest_zero):
    """Scale and zero-point of a group from its extremes, as AutoGPTQ's."""
    top = 2**bits - 1
    low_O, high_O = np.minimum(weight_RO.min(0), 0), np.maximum(weight_RO.max(0), 0)
    if sym:
        high_O = np.maximum(-low_O, high_O)
        low_O = -high_O
    scale_O = ((high_O - low_O) / top).astype(np.float16).astype(np.float64)
    zero_O = np.full_like(scale_O, 2 ** (bits - 1)) if sym else np.clip(np.rint(-low_O / scale_O), smallest_zero, top)
    return scale_O, zero_O


def textbook(weight_IO, hessian_II, settings: MatrixSettings):
    """The paper's algorithm: W dequantized, rows in natural order; right-looking, with the factor of the inverse."""
    in_features = len(weight_IO)
    group_size = in_features if settings.group_size == -1 else settings.group_size
    diagonal_I = np.diagonal(hessian_II)
    groups = [np.arange(a, min(a + group_size, in_features)) for a in range(0, in_features, group_size)]
    if settings.order == "activation":
        order = np.argsort(-diagonal_I, kind="stable")
    elif settings.order == "group_aware":
        ranked = sorted(groups, key=lambda rows: -diagonal_I[rows].max())
        order = np.concatenate([rows[np.argsort(-diagonal_I[rows], kind="stable")] for rows in ranked])
    else:
        order = np.arange(in_features)
    if settings.static_groups:
        group_of = np.arange(in_features) // group_size
        grids = [span_grid(weight_IO[rows], settings.bits, settings.sym, settings.smallest_zero) for rows in groups]
    elif settings.order == "activation":
        group_of = np.empty(in_features, int)
        group_of[order] = np.arange(in_features) // group_size
        grids = [None] * len(groups)
    else:
        group_of = np.arange(in_features) // group_size
        grids = [None] * len(groups)
    damped_II = hessian_II + settings.damp * diagonal_I.mean() * np.eye(in_features)
    upper_II = np.linalg.cholesky(np.linalg.inv(damped_II[order][:, order])).T
    work_RO, out_RO = weight_IO[order].astype(np.float64).copy(), np.zeros_like(weight_IO, np.float64)
    for r in range(in_features):
        if r % 128 == 0 or 128 % group_size:  # AutoGPTQ's blocks: scales from the weights as they were before the block
            before_RO = work_RO.copy()
        group = group_of[order[r]]
        if grids[group] is None:  # the first row of its group: the others follow at once in all dynamic orders
            members = np.flatnonzero(group_of[order] == group)
            grids[group] = span_grid(before_RO[members], settings.bits, settings.sym, settings.smallest_zero)
        scale_O, zero_O = grids[group]
        q_O = np.clip(np.rint(work_RO[r] / scale_O) + zero_O, 0, 2**settings.bits - 1)
        out_RO[r] = scale_O * (q_O - zero_O)
        error_O = (work_RO[r] - out_RO[r]) / upper_II[r, r]
        work_RO[r:] -= np.outer(upper_II[r, r:], error_O)
    natural_IO = np.empty_like(out_RO)
    natural_IO[order] = out_RO
    return natural_IO


def loss(quantized_IO, weight_IO, x_TI):
    return np.linalg.norm(x_TI @ (quantized_IO - weight_IO)) ** 2


CASES = [
    MatrixSettings(4, 32, True, "natural", scale_search=False),
    MatrixSettings(4, 32, False, "natural", scale_search=False),
    MatrixSettings(4, 32, True, "activation", scale_search=False),
    MatrixSettings(3, 32, False, "group_aware", scale_search=False),
    MatrixSettings(2, 32, True, "group_aware", scale_search=False),
    MatrixSettings(8, 32, True, "activation", static_groups=True, scale_search=False),
    MatrixSettings(4, 40, False, "activation", static_groups=True, scale_search=False),  # 40, 40 and a short 16
    MatrixSettings(4, 40, True, "group_aware", scale_search=False),
    MatrixSettings(4, 40, True, "activation", scale_search=False),
    MatrixSettings(4, -1, False, "activation", scale_search=False),
    MatrixSettings(4, 1024, True, "natural", scale_search=False),
]


def name(settings):
    kind = f"{settings.bits}bit-g{settings.group_size}-{'sym' if settings.sym else 'asym'}-{settings.order}"
    return kind + ("-static" if settings.static_groups else "")


@pytest.mark.parametrize("block", [16, 1000])
@pytest.mark.parametrize("settings", CASES, ids=name)
def test_the_papers_numbers_whatever_the_block_size(settings, block):
    x_TI, weight_IO, hessian_II = correlated()
    got = quantize_matrix(weight_IO, hessian_II, settings, block=block)
    want_IO = textbook(weight_IO, hessian_II, settings)
    got_IO = dequantize(got.tensor)
    # A weight that lies half-way between two points may go either way in float32, and changes those after it.
    assert (np.abs(got_IO - want_IO).max(0) < 1e-6).mean() > 0.85
    assert loss(got_IO, weight_IO, x_TI) == pytest.approx(loss(want_IO, weight_IO, x_TI), rel=0.02)
    np.testing.assert_allclose(np.asarray(got.weight_IO), got_IO, atol=1e-6)
    assert got.error == pytest.approx(loss(got_IO, weight_IO, x_TI) / np.linalg.norm(x_TI @ weight_IO) ** 2, rel=1e-3)


@pytest.mark.parametrize("settings", CASES[::2], ids=name)
def test_error_on_its_own_inputs_is_below_roundings(settings):
    x_TI, weight_IO, hessian_II = correlated()
    settings = dataclasses.replace(settings, scale_search=True)
    got_IO = dequantize(quantize_matrix(weight_IO, hessian_II, settings).tensor)
    rounded = round_to_nearest(
        weight_IO, bits=settings.bits, group_size=min(settings.group_size, 96), symmetric=settings.sym
    )
    assert loss(got_IO, weight_IO, x_TI) < 0.7 * loss(dequantize(rounded), weight_IO, x_TI)


def test_scale_search_and_order_pay():
    losses = {}
    for order in ("natural", "group_aware"):
        for search in (False, True):
            settings = MatrixSettings(3, 32, True, order, scale_search=search)
            total = 0.0
            for seed in range(3):
                x_TI, weight_IO, hessian_II = correlated(seed=seed)
                total += loss(dequantize(quantize_matrix(weight_IO, hessian_II, settings).tensor), weight_IO, x_TI)
            losses[order, search] = total
    assert losses["natural", True] < 0.95 * losses["natural", False]
    assert losses["group_aware", True] < 0.95 * losses["group_aware", False]
    assert losses["group_aware", True] < losses["natural", True]


def test_act_order_groups_follow_the_order_unless_static():
    _, weight_IO, hessian_II = correlated()
    dynamic = quantize_matrix(weight_IO, hessian_II, MatrixSettings(4, 32, order="activation")).tensor
    settings = MatrixSettings(4, 32, order="activation", static_groups=True)
    static = quantize_matrix(weight_IO, hessian_II, settings).tensor
    np.testing.assert_array_equal(dynamic.permutation, np.argsort(-np.diagonal(hessian_II), kind="stable"))
    assert static.permutation is None
    assert quantize_matrix(weight_IO, hessian_II, MatrixSettings(4, 32, order="group_aware")).tensor.permutation is None


def test_calibration_is_used():
    _, weight_IO, hessian_II = correlated(seed=0)
    _, _, other_II = correlated(seed=7)
    settings = MatrixSettings(4, -1, scale_search=False)
    one, other = (quantize_matrix(weight_IO, h, settings).tensor for h in (hessian_II, other_II))
    assert (layout.unpack(one.packed, 4, 96) != layout.unpack(other.packed, 4, 96)).mean() > 0.1


def test_per_channel_beyond_the_block():
    x_TI, weight_IO, hessian_II = correlated(in_features=320)
    got = quantize_matrix(weight_IO, hessian_II, MatrixSettings(4, -1, scale_search=False, order="natural"))
    assert got.tensor.scales.shape == (1, 24)
    rounded_IO = dequantize(round_to_nearest(weight_IO, bits=4, group_size=-1, symmetric=True))
    assert loss(dequantize(got.tensor), weight_IO, x_TI) < 0.7 * loss(rounded_IO, weight_IO, x_TI)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["natural", "activation", "group_aware"])
def test_zero_groups_and_outputs_stay_zero(sym, order):
    rng = np.random.default_rng(0)
    weight_IO = rng.normal(size=(96, 8)).astype(np.float32)
    weight_IO[32:64, 1] = 0
    weight_IO[:, 3] = 0
    hessian_II = np.diag(rng.uniform(0.5, 2, 96))  # no correlations: nothing moves a zero weight
    tensor = quantize_matrix(weight_IO, hessian_II, MatrixSettings(4, 32, sym, order)).tensor
    assert np.isfinite(tensor.scales).all() and (tensor.scales > 0).all() and tensor.scales.dtype == np.float16
    assert (dequantize(tensor)[weight_IO == 0] == 0).all()


def test_cross_moves_the_target():
    """Inputs from quantized layers: the least-squares answer in float64, rounded to 8 bits, is what comes out."""
    x_TI, weight_IO, _ = correlated()
    rng = np.random.default_rng(5)
    noisy_TI = x_TI + rng.normal(size=x_TI.shape) * 0.5 * x_TI.std(0)
    hessian_II = noisy_TI.T @ noisy_TI / len(x_TI)
    cross_IO = noisy_TI.T @ ((x_TI - noisy_TI) @ weight_IO) / len(x_TI)
    settings = MatrixSettings(8, 32, damp=1e-4)
    plain_IO = dequantize(quantize_matrix(weight_IO, hessian_II, settings).tensor)
    moved_IO = dequantize(quantize_matrix(weight_IO, hessian_II, settings, cross_IO=cross_IO).tensor)
    best_IO = np.linalg.lstsq(noisy_TI, x_TI @ weight_IO, rcond=None)[0]
    want, got, unmoved = (np.linalg.norm(noisy_TI @ w - x_TI @ weight_IO) for w in (best_IO, moved_IO, plain_IO))
    assert got < 1.02 * want
    assert unmoved > 1.1 * want


def test_few_tokens_large_activations_copied_features(caplog):
    _, weight_IO, _ = correlated()
    rng = np.random.default_rng(0)
    x_TI = rng.normal(size=(4, 96)) * 1e4
    x_TI[:, 5] = x_TI[:, 4]
    hessian_II = x_TI.T @ x_TI / 4
    settings = MatrixSettings(4, 32, damp=0.0)
    got = quantize_matrix(weight_IO, hessian_II, settings, where="layers.3.mlp.down")
    assert np.isfinite(dequantize(got.tensor)).all()
    assert got.damp > 0
    assert f"layers.3.mlp.down: damping raised from 0 to {got.damp:g}" in caplog.text


def test_nothing_reached_it_is_rounding():
    _, weight_IO, _ = correlated()
    settings = MatrixSettings(4, 32, scale_search=False)
    got_IO = dequantize(quantize_matrix(weight_IO, np.zeros((96, 96)), settings).tensor)
    want_IO = textbook(weight_IO, np.eye(96), dataclasses.replace(settings, order="natural"))
    np.testing.assert_allclose(got_IO, want_IO, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, h: (w, h * np.nan), "here: NaN or infinity in the activations"),
        (lambda w, h: (w * np.inf, h), "here: NaN or infinity in the weights"),
        (lambda w, h: (w * 1e8, h), "here: weights reach .* too large for float16"),
        (lambda w, h: (w, h[:5, :5]), "here: H has shape"),
        (lambda w, h: (w, -h), "here: H is not positive definite"),
    ],
)
def test_bad_input(change, message):
    _, weight_IO, hessian_II = correlated()
    with pytest.raises(ValueError, match=message):
        quantize_matrix(*change(weight_IO, hessian_II), MatrixSettings(4, 32), where="here")


def test_a_float_stream_that_overflows():
    _, weight_IO, hessian_II = correlated()
    with pytest.raises(ValueError, match="here: NaN or infinity in the activations of the float model"):
        quantize_matrix(weight_IO, hessian_II, MatrixSettings(4, 32), cross_IO=weight_IO * np.inf, where="here")


@pytest.mark.parametrize("bad", [{"bits": 5}, {"group_size": 0}, {"order": "x"}, {"damp": 1.0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MatrixSettings(**bad)
