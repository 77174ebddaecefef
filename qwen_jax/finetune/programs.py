"""The compiled training step, on one device or a mesh: losses, gradients, AdamW."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_sums import compiler_options
from pallas_kernels.chip import default_chip
from qwen_jax.adapted_linear import Dropout
from qwen_jax.finetune import forward, parameters
from qwen_jax.finetune.forward import Frozen
from qwen_jax.finetune.rows import Batch, warmup_steps
from qwen_jax.finetune.settings import FinetuneSettings
from qwen_jax.model import Decoder
from qwen_jax.sharded_weights import ShardedWeights
from qwen_jax.sharding import DATA, MODEL, parameter_axes, spec


class State(NamedTuple):
    """What a step changes: everything that a checkpoint holds.

    Attributes:
        parameters: see `parameters`.
        optimizer: optax's state.
        step: int32, steps done.
    """

    parameters: Any
    optimizer: Any
    step: Any


class Metrics(NamedTuple):
    """Of one step, float32: mean loss of a prediction, predictions, norm of the gradient before clipping, rate."""

    loss: Any
    learned_tokens: Any
    gradient_norm: Any
    learning_rate: Any


def schedule(settings: FinetuneSettings, steps: int) -> optax.Schedule:
    """Learning rate by steps done: linear from 0 over the warm-up, then as `settings.schedule` says, ending at 0.

    The first step of a warm-up of n has rate 1/n of the highest, not 0.
    """
    rise = warmup_steps(settings.warmup, steps)
    rate, rest = settings.learning_rate, max(steps - rise, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "constant": lambda: optax.constant_schedule(rate),
    }[settings.schedule]()
    if not rise:
        return after
    return optax.join_schedules([lambda step: rate * (step + 1) / rise, after], [rise])


def optimizer(settings: FinetuneSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by the norm over all parameters, then AdamW."""

    def decayed(tree):
        saved = {path: not parameters.is_norm(path) for path in tree["saved"]}
        return {"terms": jax.tree.map(lambda _: True, tree["terms"]), "saved": saved}

    adamw = optax.adamw(
        rate,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=decayed if settings.weight_decay else None,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw) if settings.clip else adamw


class TrainingPrograms:
    """The compiled step of one model.

    Attributes:
        frozen: the base's arrays and tables, which every step reads and none changes.
    """

    def __init__(self, decoder: Decoder, weights, tree, scales, settings: FinetuneSettings, steps: int):
        self.settings = settings
        leaves, self._structure = jax.tree.flatten(decoder)
        tables, table_axes = parameters.tables(tree, decoder, weights)
        self.frozen = Frozen(leaves, scales, tables)
        self.rate = schedule(settings, steps)
        self.optimizer = optimizer(settings, self.rate)
        self.placement = weights.placement if isinstance(weights, ShardedWeights) else None
        local: Callable = self._local
        if self.placement is not None:
            axes = jax.tree.map(spec, table_axes, is_leaf=lambda node: isinstance(node, tuple))
            specs = Frozen([spec(names) for names in parameter_axes(decoder)], P(), axes)
            rows = spec(("layers", "batch"))  # accumulations are walked one after the other
            local = jax.shard_map(
                self._local,
                mesh=self.placement.mesh,
                in_specs=(P(), specs, rows, P()),
                out_specs=P(),
                check_vma=False,  # kernels written in Pallas cannot say along which axes their result varies
            )
        self._gradients = local
        options = compiler_options(default_chip())
        self._step = jax.jit(self._run_step, donate_argnums=0, compiler_options=options)
        self._losses = jax.jit(lambda tree, *rest: local(tree, *rest)[:3], compiler_options=options)

    def start(self, tree) -> State:
        """The state before the first step; takes the arrays over."""
        tree = jax.tree.map(self._everywhere, tree)
        return State(tree, self._begin(tree), self._everywhere(jnp.zeros((), jnp.int32)))

    def step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step of AdamW; `state` is used up."""
        return self._step(state, self.frozen, self._rows(batch))

    def gradients(self, tree, batch: Batch):
        """(mean loss, its gradients) of one step, without changing anything; for tests and other optimizers."""
        total, count, grads = self._losses(tree, self.frozen, self._rows(batch), jnp.zeros((), jnp.int32))
        return total / count, jax.tree.map(lambda grad: grad / count, grads)

    def lower(self, state: State, batch: Batch):
        """The step lowered but not compiled, of arrays or shapes: for what it will need."""
        return self._step.lower(state, self.frozen, batch)

    # -- placing -------------------------------------------------------------------------------------------------------

    def _everywhere(self, array):
        array = jnp.asarray(array)
        return array if self.placement is None else jax.device_put(array, NamedSharding(self.placement.mesh, P()))

    def _begin(self, tree):
        begun = self.optimizer.init(tree)
        return jax.tree.map(self._everywhere, begun)

    def _rows(self, batch: Batch) -> Batch:
        if self.placement is None:
            return jax.tree.map(jnp.asarray, batch)
        names = ("layers", "batch", "length")
        put = self.placement.rows
        return jax.tree.map(lambda array: put(np.asarray(array), names[: array.ndim]), batch)

    # -- compiled ------------------------------------------------------------------------------------------------------

    def _run_step(self, state: State, frozen: Frozen, batch: Batch):
        total, count, grads = self._gradients(state.parameters, frozen, batch, state.step)
        grads = jax.tree.map(lambda grad: grad / jnp.maximum(count, 1.0), grads)
        norm = jnp.sqrt(sum((jnp.sum(grad * grad) for grad in jax.tree.leaves(grads)), jnp.zeros((), jnp.float32)))
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
            updates, begun = self.optimizer.update(grads, state.optimizer, state.parameters)
            tree = optax.apply_updates(state.parameters, updates)
            rate = jnp.asarray(self.rate(state.step), jnp.float32)
        metrics = Metrics(total / jnp.maximum(count, 1.0), count, norm, rate)
        return State(tree, begun, state.step + 1), metrics

    def _local(self, tree, frozen: Frozen, batch: Batch, step):
        """(Σ losses, predictions, gradients of the sum) over all accumulations and, on a mesh, all devices.

        The gradients of what each device computes with the whole parameters are added up over all devices. The loss is
        the same on all devices of "model", so that each takes its part of it.
        """
        placement = self.placement
        part = 1 if placement is None else placement.model
        base = jax.random.fold_in(jax.random.key(self.settings.seed), step)
        if placement is not None:
            base = jax.random.fold_in(base, lax.axis_index(DATA))

        def one(number, batch):
            rate = self.settings.dropout
            dropout = Dropout(rate, jax.random.fold_in(base, number)) if rate else None

            def loss(tree):
                decoder = jax.tree.unflatten(self._structure, frozen.leaves)
                total, count = forward.losses(decoder, tree, frozen, batch, dropout=dropout, remat=self.settings.remat)
                return total / part, (total, count)

            grads, (total, count) = jax.grad(loss, has_aux=True)(tree)
            return total, count, grads

        accumulations = batch.ids.shape[0]
        if accumulations == 1:
            total, count, grads = one(0, jax.tree.map(lambda array: array[0], batch))
        else:
            zero = jnp.zeros((), jnp.float32)
            start = (zero, zero, jax.tree.map(jnp.zeros_like, tree))
            numbered = (jnp.arange(accumulations, dtype=jnp.int32), batch)
            add = lambda carry, each: (jax.tree.map(jnp.add, carry, one(*each)), None)  # noqa: E731
            (total, count, grads), _ = lax.scan(add, start, numbered)
        if placement is not None:
            total, count = lax.psum((total, count), DATA)
            grads = jax.tree.map(functools.partial(lax.psum, axis_name=(DATA, MODEL)), grads)
        return total, count, grads
