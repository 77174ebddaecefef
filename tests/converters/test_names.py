"""The tables of names are one-to-one, and each family's golden files fill them exactly."""

import pytest

from converters import names
from qwen_jax.config import ModelConfig
from tests.edited import CASES, GOLDEN, tensors_of


@pytest.mark.parametrize("family", names.TABLES)
def test_tables_are_one_to_one(family):
    table = names.TABLES[family]
    assert len(set(table.values())) == len(table)
    for theirs, ours in table.items():
        stored = "weight" if theirs.endswith(".weight") else "qweight"
        name = theirs.replace("{n}", "17").replace("*", stored)
        path = ours.replace("{n}", "17").removesuffix(".*")
        assert names.ours(family, name) == (path, stored)
        assert f"{names.theirs(family, path)}.{stored}" == name


@pytest.mark.parametrize("case", CASES)
def test_golden_files_fill_the_tables(case):
    config = ModelConfig.from_folder(GOLDEN / case / "source")
    found = {names.ours(config.family, name) for name in tensors_of(GOLDEN / case / "source")}
    paths = {path for path, stored in found if stored == "weight"}
    assert paths == {*names.modules(config), *names.vectors(config)}
    biased = {path for path, stored in found if stored == "bias"}
    assert biased == {path for path in names.modules(config) if names.may_have_bias(config, path)}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.w2.weight",
        "model.layers.x.mlp.up_proj.weight",
        "norm.weight",
        "model.norm.bias",
        "weight",
        "",
    ],
)
def test_names_without_a_place(name):
    assert names.ours("qwen2", name) is None


def test_in_the_first_generation_w2_is_the_gate():
    assert names.ours("qwen", "transformer.h.3.mlp.w2.qweight") == ("layers.3.mlp.gate", "qweight")


def test_paths_that_a_family_has_not():
    with pytest.raises(ValueError, match=r"'layers.0.attention.qkv' is no parameter of family 'qwen2'"):
        names.theirs("qwen2", "layers.0.attention.qkv")
