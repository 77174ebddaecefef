"""`reproducible=True`: the same bits on one device and on every mesh, logits and an 8-bit cache's bytes."""

import re

import numpy as np
import pytest

from qwen_jax import QwenForCausalLM
from qwen_jax.sharding import head_layout, parse_mesh
from tests.qwen_jax.test_golden import GOLDEN, golden, load, relative_error
from tests.qwen_jax.test_sharding import ACT_ORDER, ALL, COLLECTIVES, LIMIT, compiled_step, heads_of, make_mesh, on_mesh

PARTS = ("keys", "values", "key_scales", "key_minimums", "value_scales", "value_minimums")
OPTIONS = dict(use_cache_quantization=True, max_length=128, reproducible=True)
QUICK = [
    (ACT_ORDER, "gptq", 1, 3, True),  # act-order and zero-points, 4 heads and 5 groups on 3 devices, key biases
    # Norms of heads, 2 rows on 4 devices, the cache not rounded, a long prompt.
    pytest.param("qwen3-gptqmodel-int4-g32-dynamic-tied", "float", 4, 2, False, marks=pytest.mark.slow),
]


def check_bits(case, kind, data, model, quantized=True, long=False):
    """Prompt, three steps and greedy tokens, each mesh going on from its own cache; and a long prompt."""
    options = OPTIONS | dict(use_cache_quantization=quantized)
    one, many = load(case, kind, **options), on_mesh(case, kind, data, model, **options)
    want, tokens = golden(case), golden(case)[f"{kind}_greedy"]
    ids = want["ids"]
    B, T = ids.shape
    table = head_layout(one.config.num_heads, one.config.num_kv_heads, model).kv_table

    def check(ours, theirs, length):
        np.testing.assert_array_equal(ours[0], theirs[0])
        for name in PARTS if quantized else PARTS[:2]:
            mine, other = (np.asarray(getattr(cache._peek().kv, name)) for _, cache in (ours, theirs))
            np.testing.assert_array_equal(heads_of(mine[:, :B], table)[:, :, :, :length], other[:, :, :, :length])

    ours, theirs = many.prefill(ids), one.prefill(ids)
    check(ours, theirs, T)
    for step in range(3):
        token_B1 = tokens[:, step : step + 1]
        ours, theirs = many.decode(token_B1, ours[1]), one.decode(token_B1, theirs[1])
        check(ours, theirs, T + step + 1)
    if long:
        np.testing.assert_array_equal(many(want["long_ids"]), one(want["long_ids"]))
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=[])
    np.testing.assert_array_equal(many.generate(ids, **settings), one.generate(ids, **settings))


@pytest.mark.parametrize("case, kind, data, model, quantized", QUICK)
def test_same_bits(case, kind, data, model, quantized):
    check_bits(case, kind, data, model, quantized, long=not quantized)


@pytest.mark.slow
@pytest.mark.parametrize("case, kind, data, model", ALL)
def test_8_bit_cache_everywhere(case, kind, data, model):
    check_bits(case, kind, data, model)


def test_as_exact_as_the_default():
    """Logits of a prompt, within the limits of the default mode: against that mode and against the original code."""
    plain, ours, want = load(ACT_ORDER, "gptq"), load(ACT_ORDER, "gptq", **OPTIONS), golden(ACT_ORDER)
    last, float_last = ours.prefill(want["ids"])[0], want["float_prefill"][:, -1:]
    assert relative_error(last, plain.prefill(want["ids"])[0]) < LIMIT
    assert relative_error(last, want["gptq_prefill"][:, -1:]) < 2e-3 < relative_error(last, float_last)


def test_reductions_of_a_decode_step():
    """As without: two all-reduces a layer, one for the embedding, and act-order's gather; a layer's add four digits."""
    many = on_mesh(ACT_ORDER, "gptq", 1, 3, **OPTIONS)
    hlo, count = compiled_step(many, make_mesh(1, 3), quantized=True)
    layers, hidden = many.config.num_layers, many.config.hidden_size
    assert count == dict.fromkeys(COLLECTIVES, 0) | {"all-reduce": 2 * layers + 1, "all-gather": layers}
    assert len(re.findall(rf"= f32\[4,2,1,{hidden}\]\S* all-reduce", hlo)) == 2 * layers


@pytest.mark.parametrize("options, message", [
    (dict(dtype="bfloat16"), "reproducible=True: holds in float32, got bfloat16"),
    (dict(kernels="xla"), "reproducible=True: has kernels of its own, got kernels='xla'"),
    (dict(adapter="folder"), "reproducible=True: adapters are summed in the devices' order"),
    (dict(mesh="1x2x2"), r"reproducible=True: the shares of a cache .*Leave out the axis 'sequence'"),
    (dict(reproducible=False, kernels="exact"), 'kernels="exact": are those of reproducible=True'),
])  # fmt: skip
def test_what_does_not_go_with_it(options, message):
    if "mesh" in options:
        options = options | {"mesh": parse_mesh(options["mesh"])}
    with pytest.raises(ValueError, match=message):
        QwenForCausalLM.from_pretrained(GOLDEN / ACT_ORDER / "quantized", **{"reproducible": True, **options})
