"""What is trained: low-rank terms and whole modules, as a tree of float32 arrays; made, read from an adapter, written.

{"terms": {block: {module: {"a": [L, in, rank], "b": [L, rank, out]}}}, "saved": {our path: array}} — stacked over a
block's layers like the weights beside them; norms of layers under "saved" as "{block}.attention_norm" [L, D].
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.dense_matmul as dense
from converters import names, peft
from converters.peft import Adapter, LowRank
from pallas_kernels.dense_matmul import DenseTensor
from qwen_jax.adapter import norms, stacked
from qwen_jax.config import ModelConfig
from qwen_jax.finetune.settings import FinetuneSettings
from qwen_jax.model import Decoder
from qwen_jax.sharded_weights import ShardedWeights
from qwen_jax.sharding import split_vocabulary

Tree = dict[str, Any]


def initial(config: ModelConfig, decoder: Decoder, weights, settings: FinetuneSettings) -> Adapter:
    """An adapter that changes nothing yet: `a` random as PEFT's (uniform in ±1/√in), `b` zero, modules as they are.

    Raises:
        ValueError: unknown names of modules; a quantized module that is to be trained whole.
    """
    shapes = names.modules(config)
    rng = np.random.default_rng(settings.seed)
    modules = {}
    for path in peft.chosen(config, settings.targets(config)):
        in_features, out_features = shapes[path]
        bound = 1 / math.sqrt(in_features)  # Kaiming's, with the negative slope √5 that torch's Linear and PEFT use
        a_RI = rng.uniform(-bound, bound, (settings.rank, in_features)).astype(np.float32)
        modules[path] = LowRank(a_RI, np.zeros((out_features, settings.rank), np.float32), settings.scale)
    saved = {}
    for path in peft.savable(config, list(settings.modules_to_save)):
        saved[path] = _base_array(path, config, decoder, weights)
    return Adapter(modules, saved, {})


def from_adapter(adapter: Adapter, decoder: Decoder) -> tuple[Tree, Tree]:
    """(parameters, scales): the adapter's arrays stacked by block, and {block: {module: scale [L]}}, not trained."""
    terms: Tree = {}
    scales: Tree = {}
    saved = {path: jnp.asarray(array, jnp.float32) for path, array in adapter.saved.items() if "layers." not in path}
    for number, block in enumerate(decoder.blocks):
        layers = range(block.first, block.first + block.count)
        terms[str(number)], scales[str(number)] = {}, {}
        for module, (a_LIR, b_LRO, scale_L) in stacked(adapter, layers).items():
            terms[str(number)][module] = {"a": jnp.asarray(a_LIR), "b": jnp.asarray(b_LRO)}
            scales[str(number)][module] = jnp.asarray(scale_L)
        for name, norm in norms(block).items():
            paths = [f"layers.{layer}.{name}.scale" for layer in layers]
            if any(path in adapter.saved for path in paths):
                base_LD = np.asarray(norm.scale)
                rows = [adapter.saved.get(path, base_LD[place]) for place, path in enumerate(paths)]
                saved[f"{number}.{name}"] = jnp.asarray(np.stack(rows), jnp.float32)
    return {"terms": terms, "saved": saved}, scales


def to_adapter(parameters: Tree, template: Adapter, decoder: Decoder) -> Adapter:
    """The trained arrays by our paths; ranks, scales and the choice of modules are the template's."""
    modules, saved = {}, {}
    host = jax.device_get(parameters)
    for number, block in enumerate(decoder.blocks):
        for module, term in host["terms"][str(number)].items():
            for place in range(block.count):
                path = f"layers.{block.first + place}.{module}"
                if path in template.modules:
                    old = template.modules[path]
                    rank = len(old.a_RI)
                    a_RI, b_OR = term["a"][place].T[:rank], term["b"][place].T[:, :rank]
                    modules[path] = LowRank(np.ascontiguousarray(a_RI), np.ascontiguousarray(b_OR), old.scale)
    for name, array in host["saved"].items():
        number, _, norm = name.partition(".")
        if number.isdecimal():
            block = decoder.blocks[int(number)]
            for place in range(block.count):
                path = f"layers.{block.first + place}.{norm}.scale"
                if path in template.saved:
                    saved[path] = array[place]
        else:
            saved[name] = array
    return Adapter(modules, saved, template.settings)


def tables(parameters: Tree, decoder: Decoder, weights) -> tuple[Tree, Tree]:
    """On a mesh: which entries of the parameters each device takes, and the names of the tables' dimensions.

    {"terms": {block: {module: {"rows" or "columns": int32 [L, devices · length]}}}, "saved": {path: int32 [devices ·
    width]}}: parameters are whole on every device, each takes what lies beside its weights (heads it has copies of,
    too), and the derivative of taking adds up what they learn.
    """
    if not isinstance(weights, ShardedWeights):
        return {"terms": {}, "saved": {}}, {"terms": {}, "saved": {}}
    put = weights.placement.put
    found: Tree = {"terms": {}, "saved": {}}
    axes: Tree = {"terms": {}, "saved": {}}
    for number, block in enumerate(decoder.blocks):
        found["terms"][str(number)], axes["terms"][str(number)] = {}, {}
        for module in parameters["terms"][str(number)]:
            layers = range(block.first, block.first + block.count)
            cuts = [weights.low_rank_cuts(f"layers.{layer}.{module}") for layer in layers]
            kind = "rows" if cuts[0][0] is not None else "columns"
            chosen = (rows if columns is None else columns for rows, columns in cuts)
            index_LNI = np.stack([table for table in chosen if table is not None]).astype(np.int32)
            names = ("layers", "heads" if module.startswith("attention") else "mlp")
            table = put(lambda device, index=index_LNI: index[:, device], names)
            found["terms"][str(number)][module] = {kind: table}
            axes["terms"][str(number)][module] = {kind: names}
    for path in ("embedding", "lm_head"):
        if path in parameters["saved"]:
            ids_NV = split_vocabulary(weights.config.vocab_size, weights.placement.model).astype(np.int32)
            found["saved"][path] = put(lambda device, ids=ids_NV: ids[device], ("vocabulary",))
            axes["saved"][path] = ("vocabulary",)
    return found, axes


def is_norm(path: str) -> bool:
    """Whether an entry of "saved" is a norm's scale, which weight decay leaves alone."""
    return path not in ("embedding", "lm_head")


def size(parameters: Mapping[str, Any]) -> int:
    """Numbers that are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


def _base_array(path: str, config: ModelConfig, decoder: Decoder, weights) -> np.ndarray:
    if path.endswith(".scale"):
        if path == "final_norm.scale":
            return np.asarray(decoder.final_norm.scale, np.float32)
        _, layer, rest = path.split(".", 2)
        for block in decoder.blocks:
            if block.first <= int(layer) < block.first + block.count:
                return np.asarray(norms(block)[rest.removesuffix(".scale")].scale[int(layer) - block.first], np.float32)
    if isinstance(weights, ShardedWeights):
        tied = path == "lm_head" and config.tie_word_embeddings
        weight = weights.checkpoint.read("embedding" if tied else path).weight
    else:
        table = decoder.lm_head if path == "lm_head" and decoder.lm_head is not None else decoder.embedding
        weight = table.weight
    if not isinstance(weight, DenseTensor):
        raise ValueError(f"modules_to_save: {path} is quantized, which cannot be trained whole; leave it out.")
    return np.asarray(dense.unpack(weight).data).astype(np.float32)
