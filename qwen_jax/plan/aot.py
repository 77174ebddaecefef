"""Compiling the prefill and decode programs for TPUs that are not here, with `libtpu` on any machine."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from pallas_kernels.chip import compiling_for
from qwen_jax.config import ModelConfig
from qwen_jax.kv_cache import CacheState
from qwen_jax.model import Decoder
from qwen_jax.plan.abstract import AbstractWeights, Storage, bytes_of_a_device
from qwen_jax.plan.chips import RESERVED, Topology
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharding import DATA, MODEL, SEQUENCE

COPY_BYTES = 1 << 20  # smaller copies are activations


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled program says of one chip, in bytes.

    Attributes:
        weights: parameters.
        cache: keys, values, scales.
        arguments: all that goes in, as laid out in memory.
        temporaries: beside it.
        aliased: of the arguments, updated in place.
        copies: instructions that copy an array of the weights' or the cache's size, and that size.
        all_reduces: in the program's text; a loop over layers counts once.
        all_gathers: likewise.
        seconds: of the compiler.
    """

    weights: int
    cache: int
    arguments: int
    temporaries: int
    aliased: int
    copies: tuple[tuple[str, int], ...]
    all_reduces: int
    all_gathers: int
    seconds: float

    @property
    def peak(self) -> int:
        """Memory of a chip while it runs."""
        return self.arguments + self.temporaries


def fits(compiled: Compiled, topology: Topology) -> bool:
    """Whether the program's memory leaves a chip what the runtime reserves."""
    return compiled.peak <= topology.chip.memory * (1 - RESERVED)


def missing() -> str | None:
    """None where TPU programs can be compiled, else why not."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed; pip install 'qwen-jax[aot]'"


def devices(topology: Topology) -> list:
    """The devices of a TPU topology, which need not be here.

    Raises:
        ValueError: libtpu is missing, or does not know the topology.
    """
    if reason := missing():
        raise ValueError(f"topology {topology}: {reason}.")
    # libtpu asks these of a machine that has TPUs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling uses no TPU, so that others may run beside it
    from jax.experimental import topologies

    shape = topology.shape
    if topology.chips == 1:  # not every JAX knows a single chip: the first of four
        shape = (2, 2, 1) if topology.chip.name == "v5p" else (2, 2)
    name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise ValueError(f"topology {topology}: libtpu does not know it ({str(error).splitlines()[0]}).") from error
    return list(found)[: topology.chips]


def mesh_of(topology: Topology, data: int, model: int, sequence: int = 1) -> Mesh:
    """A mesh of a TPU topology's devices: data, model and, where it is not 1, sequence."""
    shape = (data, model, sequence)[: 2 + (sequence > 1)]
    return Mesh(np.array(devices(topology)).reshape(shape), (DATA, MODEL, SEQUENCE)[: len(shape)])


@contextlib.contextmanager
def programs(
    config: ModelConfig, storage: Storage, mesh: Mesh, chip: str, kernels: str = "auto"
) -> Iterator[tuple[ShardedPrograms, Decoder]]:
    """A model without arrays, and its programs; kernels traced in the block are those of `chip`."""
    with compiling_for(chip):
        weights = AbstractWeights(config, storage, mesh, kernels)
        decoder = Decoder(weights.config, weights, dtype=storage.dtype, kernels=kernels)
        yield ShardedPrograms(decoder, mesh), decoder


def abstract_cache(program: ShardedPrograms, batch: int, length: int, dtype: str, quantized: bool) -> CacheState:
    """The cache as `ShardedPrograms.empty_cache` would make it."""
    slots = batch + -batch % program.placement.data
    heads = {name: getattr(program.config, name) * program.placement.model for name in ("num_heads", "num_kv_heads")}
    config = dataclasses.replace(program.config, **heads)
    shapes = jax.eval_shape(lambda: CacheState.empty(config, slots, program.room(length), dtype, quantized))
    return jax.tree.map(
        lambda where, part: part and ShapeDtypeStruct(part.shape, part.dtype, sharding=where),
        program.cache_formats,
        shapes,
    )


def compile_step(
    config: ModelConfig,
    storage: Storage,
    mesh: Mesh,
    chip: str,
    *,
    batch: int,
    context: int,
    kv_bits: int = 8,
    prompt: int | None = None,
    kernels: str = "auto",
) -> Compiled:
    """Compiles one decode step, or with `prompt` the prefill of so many tokens a row.

    Args:
        config: of the model.
        storage: of its weights.
        mesh: of devices that need not be here.
        chip: their `device_kind`.
        batch: rows.
        context: tokens the cache has room for.
        kv_bits: 8 or 16.
        prompt: tokens of each row; None for decode.
        kernels: as in `from_pretrained`.
    """
    with programs(config, storage, mesh, chip, kernels) as (program, decoder):
        cache = abstract_cache(program, batch, context, storage.dtype, kv_bits == 8)
        rows = cache.lengths_B
        start = time.perf_counter()
        if prompt is None:
            lowered = program._decode.lower(program._leaves, rows, cache=cache, active_length=context)
        else:
            ids = ShapeDtypeStruct((rows.shape[0], prompt), jnp.int32, sharding=rows.sharding)
            lowered = program._prefill.lower(program._leaves, ids, rows, cache=cache)
        compiled = compile_uncached(lowered)
        seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # TPU programs have both
    watched = [leaf for leaf in jax.tree.leaves((decoder, cache.kv))]
    return Compiled(
        weights=bytes_of_a_device(decoder),
        cache=bytes_of_a_device(cache),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        copies=tuple(copies(text, watched)),
        all_reduces=len(re.findall(r" all-reduce(?:-start)?\(", text)),
        all_gathers=len(re.findall(r" all-gather(?:-start)?\(", text)),
        seconds=seconds,
    )


def compile_uncached(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without an entry in JAX's persistent cache, which cannot read back a program for absent chips."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)


def copies(text: str, arrays) -> Iterator[tuple[str, int]]:
    """Copies in a compiled program of something as large as one of these arrays, or as one layer of it."""
    names = {"int32": "s32", "int16": "s16", "uint8": "u8", "bfloat16": "bf16", "float32": "f32", "float16": "f16"}
    shapes = {}
    for array in arrays:
        shard = array.sharding.shard_shape(array.shape)
        for shape in (shard, shard[1:], (1, *shard[1:])):
            size = int(np.prod(shape)) * array.dtype.itemsize
            if size >= COPY_BYTES:
                shapes[f"{names[array.dtype.name]}[{','.join(map(str, shape))}]"] = size
    # copy-start to on-chip memory (space 1) is a prefetch, no copy.
    for match in re.finditer(r"%?(\S+) = (\w+\[[\d,]*\])(\{[^}]*\})? (copy|transpose|dynamic-slice)\(", text):
        if match.group(2) in shapes and "S(1)" not in (match.group(3) or ""):
            yield f"{match.group(4)} {match.group(2)}", shapes[match.group(2)]
