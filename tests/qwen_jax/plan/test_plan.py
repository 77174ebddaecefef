"""Plans by arithmetic, against sums written out here."""

import json

import jax
import pytest
from jax.sharding import AbstractMesh

from qwen_jax.bench.models import MODELS
from qwen_jax.plan import abstract, chips
from qwen_jax.plan.abstract import AbstractWeights, Storage
from qwen_jax.plan.plan import estimate, plans
from qwen_jax.sharding import parameter_axes

BIG = {"batch": 8, "context": 2048, "kv_bits": 8}


def test_bytes_of_7b():
    """Words, scales, norms, biases and two tables, as upstream's shapes say."""
    plan = estimate(MODELS["qwen-7b"], Storage(), chips.parse("h100:1"), 1, 1, **BIG)
    matrices = 4096 * 12288 + 4096 * 4096 + 2 * 4096 * 11008 + 11008 * 4096
    layers = 32 * (matrices // 2 + matrices // 128 * 2 + 4 * (2 * 4096 + 12288 + 4096))
    assert plan.weights == layers + 2 * 2 * 151936 * 4096 + 4 * 4096
    assert plan.cache == 8 * 2048 * 32 * 2 * 32 * (128 + 4)
    read = plan.weights - 2 * 151936 * 4096 + plan.cache  # of the token table a step reads some rows
    assert plan.read_seconds == pytest.approx(read / 3350e9)
    assert plan.tokens_per_second == pytest.approx(8 * 3350e9 / read)
    assert plan.compute_seconds == pytest.approx(2 * 8 * (32 * matrices + 151936 * 4096) / 989e12, rel=0.01)


@pytest.mark.parametrize(
    ("name", "topology", "best", "fits"),
    [
        ("qwen-7b", "v5e", "1x1", True),
        ("qwen-72b", "v5e:2x4", "1x8", True),
        ("qwen-72b", "v5e:2x2", "1x4", True),
        ("qwen-72b", "h100:1", "1x1", True),
        ("qwen-14b", "v5e:1x1", "1x1", False),
    ],
)
def test_best_mesh_and_whether_it_fits(name, topology, best, fits):
    first, *others = plans(MODELS[name], Storage(), chips.parse(topology), **BIG)
    assert (f"{first.data}x{first.model}", first.fits) == (best, fits)
    assert all(first.tokens_per_second >= other.tokens_per_second for other in others if other.fits == first.fits)


def test_shares_add_up():
    """28 heads over 4 key/value heads, 148 groups and 152064 tokens on 8 chips: padding is counted, and small."""
    config, storage = MODELS["qwen2.5-7b"], Storage(zeros=True)
    alone, *_, shared = (
        estimate(config, storage, chips.parse("v5e:2x4"), 8 // model, model, **BIG) for model in (1, 2, 8)
    )
    assert alone.weights <= shared.weights * 8 < 1.12 * alone.weights
    assert shared.cache == 8 * 2048 * 28 * 2 * 132  # one head on each of 8 chips: two copies of each of the 4


def test_a_cache_split_along_its_length():
    """Qwen2.5-7B's 4 key/value heads on 8 chips: copied twice, or each half as long; attention's weights copied then.
    The longer the cache, the better for the latter."""
    config, storage, topology = MODELS["qwen2.5-7b"], Storage(), chips.parse("h100:8")
    long = {"batch": 1, "context": 131072, "kv_bits": 8}
    heads = estimate(config, storage, topology, 1, 8, **long)
    both = estimate(config, storage, topology, 1, 4, sequence=2, **long)
    assert (heads.mesh, both.mesh) == ("1x8", "1x4x2")
    assert both.cache == 131072 // 2 * 28 * 2 * 132 == heads.cache // 2
    attention = 28 * (28 + 2 * 4 + 28) * 128 * 3584  # numbers of query, key, value and output
    more = attention / 4 - attention / 8  # held by four instead of eight
    assert both.weights - heads.weights == pytest.approx(more / 2 * (1 + 4 / 128), rel=0.25)  # 28 heads pad to 32 on 8
    assert both.read_seconds < heads.read_seconds and both.reduce_seconds > heads.reduce_seconds
    assert plans(config, storage, topology, **long)[0].sequence > 1


@pytest.mark.parametrize("storage", [Storage(), Storage(bits=8, group_size=-1, zeros=True), Storage(bits=16)])
def test_abstract_arrays_have_names(storage):
    """As many names as dimensions, and each dimension on "model" divides."""
    from qwen_jax.model import Decoder

    weights = AbstractWeights(MODELS["qwen2.5-0.5b"], storage, AbstractMesh((1, 2), ("data", "model")))
    decoder = Decoder(weights.config, weights, dtype="bfloat16")
    for leaf, names in zip(jax.tree.leaves(decoder), parameter_axes(decoder), strict=True):
        assert len(names) == leaf.ndim and leaf.sharding.shard_shape(leaf.shape)
    assert decoder.lm_head is None and abstract.bytes_of_a_device(decoder) > 0


def test_errors():
    for text in ("v9:2", "v5e:2xx", "v5e:0x2", "h100:two"):
        with pytest.raises(ValueError, match="expected one of .* and a shape, as v5e:2x4 or h100:8"):
            chips.parse(text)
    with pytest.raises(ValueError, match="no mesh of 64 chips suits 14 heads and 1 rows"):
        plans(MODELS["qwen2.5-0.5b"], Storage(), chips.parse("v5e:8x8"), batch=1, context=4, kv_bits=8)


def test_command(capsys):
    pytest.importorskip("typer", reason="the command line is not installed")
    from qwen_jax import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            cli.main(["plan", *arguments])
        return done.value.code, capsys.readouterr()

    code, out = run("qwen-72b", "--topology", "v5e:2x4", "--batch", "8", "--no-compile", "--json")
    facts = json.loads(out.out)
    assert code == 0 and facts["best"]["model"] == 8 and facts["best"]["fits"] and len(facts["meshes"]) == 10
    code, out = run("qwen-7b", "--topology", "h100:2", "--batch", "4", "--mesh", "2x1x1", "--kv", "bf16")
    assert code == 0 and "→ 2x1 " in out.out and "arithmetic alone" in out.out
    code, out = run("qwen-7b", "--topology", "h100:2", "--mesh", "1x1x2")
    assert code == 0 and "→ 1x1x2" in out.out
    for arguments, message in (
        (("qwen-7b", "--topology", "h100:2", "--mesh", "4x1"), "is none of ['1x2'"),
        (("qwen-7b", "--topology", "h100:1", "--kv", "int4"), "kv='int4' is none of"),
        (("qwen-7b", "--topology", "h100:1", "--bits", "3"), "bits=3 is none of [4, 8, 16]"),
    ):
        code, out = run(*arguments)
        assert code == 1 and message in out.err
