"""Meshes with an axis "sequence", over which a cache's length is split; more quick cases are in `test_sharding.py`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.kv_attention import KVArrays
from qwen_jax import QwenForCausalLM, split_cache
from qwen_jax.finetune import finetune
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharding import mesh_name, parse_mesh
from tests.qwen_jax.test_golden import CASES, FOLDER, GOLDEN, decode_logits, golden, load, relative_error
from tests.qwen_jax.test_model_features import QWEN2, edited
from tests.qwen_jax.test_sharding import ACT_ORDER, COLLECTIVES, LIMIT, check_8_bit_cache, check_case, on_mesh

MESHES = [(1, 1, 2), (1, 2, 2), (1, 1, 3), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
ALL = [(case, kind, *mesh) for case in CASES for kind in FOLDER for mesh in MESHES]


@pytest.mark.slow
@pytest.mark.parametrize("case, kind, data, model, sequence", ALL)
def test_equals_one_device_everywhere(case, kind, data, model, sequence):
    check_case(case, kind, data, model, sequence)
    check_8_bit_cache(case, kind, data, model, sequence)


@pytest.mark.slow
def test_sampling_adapters_and_a_rounded_head():
    ids, tokens = golden(ACT_ORDER)["ids"], golden(ACT_ORDER)["gptq_greedy"][:, :3]
    settings = dict(max_new_tokens=9, do_sample=True, eos_token_id=[], seed=[3, 4], repetition_penalty=1.3)
    settings |= dict(top_k=50, top_p=0.9, min_p=0.01, temperature=1.5)
    one, many = load(ACT_ORDER, "gptq"), on_mesh(ACT_ORDER, "gptq", 1, 2, 2)
    np.testing.assert_array_equal(many.generate(ids, **settings), one.generate(ids, **settings))
    for options in (dict(adapter=str(GOLDEN / ACT_ORDER / "lora" / "adapter")), dict(lm_head="int8")):
        one, many = load(ACT_ORDER, "gptq", **options), on_mesh(ACT_ORDER, "gptq", 1, 2, 2, **options)
        assert relative_error(decode_logits(many, ids, tokens), decode_logits(one, ids, tokens)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_sliding_window(tmp_path, quantized):
    """Of a window of 8 each of three devices sees two tokens or three."""
    folder = edited(tmp_path / "model", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    options = dict(dtype="float32", use_cache_quantization=quantized)
    one = QwenForCausalLM.from_pretrained(folder, **options)
    many = QwenForCausalLM.from_pretrained(folder, mesh=parse_mesh("1x2x3"), **options)
    ids, tokens = golden(QWEN2)["ids"], golden(QWEN2)["float_greedy"][:, :3]
    limit = 2.5e-3 if quantized else LIMIT
    assert relative_error(decode_logits(many, ids, tokens), decode_logits(one, ids, tokens)) < limit


@pytest.mark.parametrize("window", [None, 5])
def test_attention_over_shares(window):
    """Prompts of 1, 7 and 12 tokens, then four single tokens, over three shares and over a whole cache."""
    mesh, random = parse_mesh("1x1x3"), np.random.default_rng(0)
    B, G, H, S, K = 3, 1, 2, 24, 8
    new = [jnp.asarray(random.normal(size=(B, T, G, K)), jnp.float32) for T in (12, 1, 1, 1, 1)]
    query = jnp.asarray(random.normal(size=(5, B, H, K)), jnp.float32)
    first = jnp.asarray([1, 7, 12], jnp.int32)

    def run(axis, length):
        kv = KVArrays(*[jnp.zeros((1, B, G, length, K), jnp.float32)] * 2)
        found = []
        for step, tokens in enumerate(new):
            start = jnp.zeros(B, jnp.int32) if step == 0 else first + step - 1
            kv = split_cache.append(kv, 0, tokens, 2 * tokens, start, axis=axis, heads=H, kernels="xla")
            options = dict(scale=0.5, sliding_window=window, active_length=18, kernels="xla")
            found.append(split_cache.attend_decode(query[step], kv, 0, first + step, axis=axis, **options))
        return jnp.stack(found)

    split = jax.shard_map(lambda: run("sequence", S // 3), mesh=mesh, in_specs=(), out_specs=P(), check_vma=False)
    np.testing.assert_allclose(jax.jit(split)(), run(None, S), rtol=1e-5, atol=1e-6)


def test_what_moves_between_devices():
    """Beside the sums of a layer one gather of attention's results, of the queries' size; nothing of the cache."""
    many = on_mesh(ACT_ORDER, "float", 1, 2, 2)
    programs: ShardedPrograms = many._programs
    cache = programs.empty_cache(2, 100, "float32", False)
    assert cache.kv.keys.shape[3] == 112  # two shares of whole tiles
    share = cache.kv.keys.addressable_shards[0].data.shape
    assert share == (many.config.num_layers, 2, 1, 56, many.config.head_dim)
    token = programs._rows(np.zeros(2, np.int32))
    hlo = programs._decode.lower(programs._leaves, token, cache=cache, active_length=100).compile().as_text()
    count = {op: len(re.findall(rf"= \S+ {op}(-start)?\(", hlo)) for op in COLLECTIVES}
    # In the loop over the layers two sums and the gather; outside it the embedding's sum.
    assert count == dict.fromkeys(COLLECTIVES, 0) | {"all-reduce": 3, "all-gather": 1}
    [shape] = re.findall(r"= \S+?\[([\d,]+)\]\S* all-gather", hlo)
    heads = many.decoder.blocks[0].attention.heads
    assert np.prod([int(size) for size in shape.split(",")]) == 2 * 2 * heads * (many.config.head_dim + 1)
    mlp = many.decoder.blocks[0].mlp.down.weight.data
    assert mlp.addressable_shards[0].data.nbytes * 4 == mlp.nbytes  # the MLP over both axes


def test_names_of_meshes():
    for text in ("1x8", "2x2x2", "1x1x4"):
        assert mesh_name(parse_mesh(text)) == text
    assert mesh_name(None) == "1x1" and mesh_name(parse_mesh("1x2x1")) == "1x2"
    for text in ("8", "1x2x2x2", "1x2x0", "1x4x4"):
        with pytest.raises(ValueError, match="a third for the length of the cache|JAX sees 8"):
            parse_mesh(text)


def test_training_has_no_cache_to_split(tmp_path):
    with pytest.raises(ValueError, match=r"axes \('data', 'model', 'sequence'\), expected 'data' and 'model'"):
        finetune(GOLDEN / ACT_ORDER / "quantized", tmp_path, tmp_path / "out", mesh=parse_mesh("1x1x2"))
