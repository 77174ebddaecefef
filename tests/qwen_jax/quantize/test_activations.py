"""Second moments in float64, in which dtype activations are calibrated, and where they wait."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.quantize import QuantizeSettings
from qwen_jax.quantize.activations import ActivationStore, device_room
from qwen_jax.quantize.hessian import Moments
from qwen_jax.quantize.pipeline import calibration_dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("in_features", [24, 260])
def test_moments(dtype, in_features):
    """Whatever the dtype of activations, products are exact and sums float32."""
    rng = np.random.default_rng(0)
    moments, square_II, inputs_II, outputs_IO = Moments(in_features), 0, 0, 0
    for _ in range(3):
        x_BTI, missing_BTI = (jnp.asarray(rng.normal(size=(2, 300, in_features)) + 0.5, dtype) for _ in range(2))
        missing_BTO = jnp.asarray(rng.normal(size=(2, 300, 7)), jnp.float32)
        mask_BT = (np.arange(300) < np.array([[300], [41]])).astype(np.float32)
        x_BTI = x_BTI.at[1, 41:].set(np.nan)  # padding may hold anything
        moments.add(x_BTI, mask_BT, missing_BTI, missing_BTO)
        x_MI, m_MI, m_MO = (np.asarray(a, np.float64)[mask_BT > 0] for a in (x_BTI, missing_BTI, missing_BTO))
        square_II, inputs_II, outputs_IO = (
            square_II + x_MI.T @ x_MI,
            inputs_II + x_MI.T @ m_MI,
            outputs_IO + x_MI.T @ m_MO,
        )
    weight_IO = rng.normal(size=(in_features, 7)).astype(np.float32)
    want_IO = (inputs_II @ weight_IO.astype(np.float64) + outputs_IO) / (3 * 341)
    assert moments.tokens == 3 * 341
    np.testing.assert_allclose(moments.hessian(), square_II / (3 * 341), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.cross(weight_IO), want_IO, rtol=1e-5, atol=1e-5)


def device(platform, capability=None, **statistics):
    return types.SimpleNamespace(
        platform=platform, compute_capability=capability, memory_stats=lambda: statistics or None
    )


@pytest.mark.parametrize(
    ("platform", "capability", "want"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "7.5", "float32"),  # a T4 runs models in float16, which activations may not fit
    ],
)
def test_dtype(platform, capability, want):
    assert calibration_dtype(device(platform, capability)) == want


def test_room_on_the_devices():
    big, used = device("gpu", bytes_limit=100, bytes_in_use=10), device("gpu", bytes_limit=100, bytes_in_use=20)
    assert device_room([big], 0) == 45  # half of what is free
    assert device_room([big], 60) == 30  # what a layer leaves
    assert device_room([big], 95) == 0
    assert device_room([big, used], 60) == 40  # the fullest of them, twice
    assert device_room([device("cpu")], 0) == device_room([device("cpu", bytes_limit=100)], 0) == 0
    assert device_room([device("gpu")], 0) == 0  # it does not say


def test_stored_where_there_is_room(tmp_path):
    store = ActivationStore(40, tmp_path, device_limit=80)
    arrays = [jnp.full(10, number, jnp.float32) for number in range(4)]
    for batch, array in enumerate(arrays):
        store.put("hidden", batch, array)
    assert [type(store.get("hidden", batch)) for batch in range(4)] == [*[type(arrays[0])] * 2, np.ndarray, np.memmap]
    assert (store.moved, store.spilled) == (80, 40)
    store.drop("hidden", 0)
    store.put("inner", 0, arrays[3])  # in the place that became free
    store.put("hidden", 1, arrays[2])  # a newer array in place of an older one
    assert store.get("inner", 0) is arrays[3] and store.get("hidden", 1) is arrays[2]
    for batch in (2, 3):
        np.testing.assert_array_equal(store.get("hidden", batch), arrays[batch])
    store.close()
    assert not list(tmp_path.iterdir())


def test_settings_that_no_reader_takes():
    settings = QuantizeSettings(format="compressed-tensors", desc_act=True, static_groups=True)
    assert settings.json()["config_groups"]["group_0"]["weights"]["actorder"] is None
    with pytest.raises(ValueError, match="desc_act: compressed-tensors .* no longer reads .*static_groups"):
        QuantizeSettings(format="compressed-tensors", desc_act=True)
    with pytest.raises(ValueError, match="dynamic: is not written in format 'compressed-tensors'"):
        QuantizeSettings(format="compressed-tensors", dynamic={"-:.*down_proj": {}})
