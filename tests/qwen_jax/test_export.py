"""Converted and written back: every tensor of the golden folders, the same to the byte."""

import numpy as np
import pytest

from qwen_jax.checkpoint_store import convert
from qwen_jax.errors import CheckpointError
from qwen_jax.export import export
from tests.edited import CASES, GOLDEN, tensors_of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["quantized", "source"])
def test_there_and_back(case, kind, tmp_path):
    convert(GOLDEN / case / kind, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "again")
    want, got = tensors_of(GOLDEN / case / kind), tensors_of(tmp_path / "again")
    assert set(want) == set(got)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_only_converted_folders(tmp_path):
    with pytest.raises(CheckpointError, match="is no converted checkpoint"):
        export(GOLDEN / CASES[0] / "source", tmp_path / "again")
