"""What a model takes of each chip and the speed it cannot exceed, by arithmetic, and the mesh where that is best.

A decode step reads every weight and the cache once, multiplies every row by every weight, and adds up two vectors a
layer between the chips of a model group: the time is the longest of the first two plus the third. Where the cache is
split along its length, the chips of a sequence exchange their results of attention as well. Real programs are slower;
on a TPU's the memory is counted from the compiled program as well (`aot.py`).
"""

import dataclasses
import itertools
import math

from jax.sharding import AbstractMesh

from pallas_kernels.chip import compiling_for
from qwen_jax.config import ModelConfig
from qwen_jax.kv_cache import bytes_per_token
from qwen_jax.model import Decoder
from qwen_jax.plan.abstract import AbstractWeights, Storage, bytes_of_a_device
from qwen_jax.plan.chips import RESERVED, Topology
from qwen_jax.sharding import DATA, MODEL, SEQUENCE, mesh_text


@dataclasses.dataclass(frozen=True)
class Plan:
    """One mesh.

    Attributes:
        data: chips that share the rows of a batch.
        model: chips that share each layer.
        sequence: chips that share the cache's length, and with `model` the MLP and the vocabulary.
        weights: bytes a chip holds.
        cache: bytes a chip holds, at full context.
        memory: bytes a chip has.
        fits: whether both leave room for the runtime and the largest activations.
        read_seconds: of a decode step, at the memory's bandwidth.
        compute_seconds: at the arithmetic's peak.
        reduce_seconds: at the links' bandwidth plus their latency.
        tokens_per_second: of all rows, at best.
        waste: padding and copies of heads, rows and vocabulary, as a ratio of the weights.
    """

    data: int
    model: int
    sequence: int
    weights: int
    cache: int
    memory: int
    fits: bool
    read_seconds: float
    compute_seconds: float
    reduce_seconds: float
    tokens_per_second: float
    waste: float

    @property
    def mesh(self) -> str:
        """As `--mesh` takes it."""
        return mesh_text(self.data, self.model, self.sequence)


def plans(
    config: ModelConfig, storage: Storage, topology: Topology, *, batch: int, context: int, kv_bits: int
) -> list[Plan]:
    """Every mesh of a topology's chips, the best first: those that fit before those that do not, by tokens/s."""
    found = []
    alone = None
    for model, sequence in itertools.product(range(1, topology.chips + 1), repeat=2):
        data, rest = divmod(topology.chips, model * sequence)
        if rest or model > config.num_heads or data > batch or sequence > context:
            continue
        sizes = dict(sequence=sequence, batch=batch, context=context, kv_bits=kv_bits)
        plan = estimate(config, storage, topology, data, model, **sizes)
        if alone is None:
            alone = _weights(config, storage, topology, 1, 1)[0]
        found.append(dataclasses.replace(plan, waste=plan.weights * model * sequence / alone - 1))
    if not found:
        raise ValueError(
            f"topology {topology}: no mesh of {topology.chips} chips suits {config.num_heads} heads and {batch} rows "
            f"of {context} tokens. Take fewer chips or more rows."
        )
    return sorted(found, key=lambda plan: (not plan.fits, -plan.tokens_per_second, plan.sequence))


def estimate(
    config: ModelConfig,
    storage: Storage,
    topology: Topology,
    data: int,
    model: int,
    *,
    batch: int,
    context: int,
    kv_bits: int,
    sequence: int = 1,
) -> Plan:
    """The arithmetic of one mesh; `waste` is left 0."""
    chip = topology.chip
    weights, read, local = _weights(config, storage, topology, model, sequence)
    rows = -(-batch // data)
    cache = rows * -(-context // sequence) * bytes_per_token(local, storage.dtype, kv_bits == 8)
    width = rows * config.hidden_size
    # A step's activations are small beside these; a prompt's are what `aot.py` counts.
    activations = 64 * width * 4
    available = chip.memory * (1 - RESERVED)
    parts = model * sequence
    parameters = _parameters(config, local, parts)

    def exchange(chips: int, numbers: float, gathers: bool = False) -> float:
        """Seconds of one reduction, or of one gather of so many numbers from each chip."""
        if chips == 1:
            return 0.0
        moved = (chips - 1) * numbers if gathers else 2 * (chips - 1) / chips * numbers
        steps = (1 if gathers else 2) * (chips - 1) if chip.platform == "tpu" else 1
        return moved * 4 / chip.link + steps * chip.hop

    attended = rows * local.num_heads * (local.head_dim + 1)
    layer = exchange(model, width) + exchange(parts, width) + exchange(sequence, attended, gathers=True)
    reductions = config.num_layers * layer + 2 * exchange(parts, width)  # the embedding's, and sampling's
    read_seconds, compute_seconds = (read + cache) / chip.bandwidth, 2 * rows * parameters / chip.flops
    seconds = max(read_seconds, compute_seconds) + reductions
    return Plan(
        data=data,
        model=model,
        sequence=sequence,
        weights=weights,
        cache=cache,
        memory=int(chip.memory),
        fits=weights + cache + activations <= available,
        read_seconds=read_seconds,
        compute_seconds=compute_seconds,
        reduce_seconds=reductions,
        tokens_per_second=batch / seconds,
        waste=0.0,
    )


def _weights(
    config: ModelConfig, storage: Storage, topology: Topology, model: int, sequence: int
) -> tuple[int, int, ModelConfig]:
    """Bytes a chip holds, those a step reads of them, and the config of a chip's share."""
    mesh = AbstractMesh((1, model, sequence), (DATA, MODEL, SEQUENCE))
    with compiling_for(topology.chip.kind):
        weights = AbstractWeights(config, storage, mesh)
        decoder = Decoder(weights.config, weights, dtype=storage.dtype)
    held = bytes_of_a_device(decoder)
    table = bytes_of_a_device(decoder.embedding)
    return held, held - (0 if decoder.lm_head is None else table), weights.config


def _parameters(config: ModelConfig, local: ModelConfig, parts: int) -> int:
    """Weights that a chip multiplies each row by."""
    heads, width = local.num_heads + local.num_kv_heads, config.head_dim
    layer = 2 * config.hidden_size * heads * width + 3 * config.hidden_size * math.ceil(
        config.intermediate_size / parts
    )
    return config.num_layers * layer + config.hidden_size * math.ceil(config.vocab_size / parts)
