"""Whoever waits for a model hears how much of it has been read: files of every kind, on one device and on a mesh."""

import pytest

from qwen_jax import QwenForCausalLM
from qwen_jax.checkpoint_store import convert
from qwen_jax.sharding import parse_mesh
from tests.edited import GOLDEN

CASE = GOLDEN / "qwen3-gptqmodel-int4-g32-dynamic-tied" / "quantized"


@pytest.mark.parametrize("mesh", [None, "1x2"])
@pytest.mark.parametrize("kind", ["Hugging Face", "converted"])
def test_progress_rises_to_its_end(kind, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr("converters.orbax.PART_BYTES", 10_000)
    folder, said = CASE, []
    if kind == "converted":
        convert(CASE, folder := tmp_path / "converted")
    devices = None if mesh is None else parse_mesh(mesh)
    QwenForCausalLM.from_pretrained(folder, mesh=devices, progress=lambda *numbers: said.append(numbers))
    total = said[0][1]
    assert len(said) > 3 and said == sorted(set(said))
    assert {each for _, each in said} == {total} and said[-1][0] == total
