"""What a fine-tuning run is asked to do."""

import dataclasses
from typing import Any

from converters import peft
from qwen_jax.config import ModelConfig

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a run; everything its result depends on, beside model and data.

    Attributes:
        rank: of the low-rank terms.
        alpha: the terms' scale is alpha / rank.
        dropout: part of a term's inputs that is dropped while training.
        rslora: the scale is alpha / √rank instead (arXiv:2312.03732).
        target_modules: projections that learn, by the family's own names ("q_proj"; the first generation: "c_attn",
            "attn.c_proj", "w1", "w2", "mlp.c_proj"); empty for all of a layer's.
        modules_to_save: embedding, head and norms that are trained whole, by the family's own names ("lm_head").
        learning_rate: the highest.
        schedule: "cosine" or "linear" down to 0, or "constant", after the warm-up.
        warmup: steps of linear rise from 0; below 1 a part of all steps.
        weight_decay: AdamW's, on all but norms.
        beta1: AdamW's.
        beta2: AdamW's.
        epsilon: AdamW's.
        clip: largest norm of the gradient; 0 for none.
        epochs: passes over the data.
        max_steps: fewer than the epochs would take, or None.
        batch_size: rows a step and accumulation.
        accumulate: batches of rows whose gradients are added up for one step.
        length: tokens a row at most; longer conversations are cut and counted.
        packing: several conversations a row, kept apart by attention; else one a row, padded to a few lengths.
        remat: compute a layer's activations once more on the way back instead of keeping them.
        seed: of the first values of the terms, of the order of the data, and of dropout.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    length: int = 1024
    packing: bool = True
    remat: bool = True
    seed: int = 0
    save_every: int = 100
    keep: int = 3

    def __post_init__(self):
        """Checks each field.

        Raises:
            ValueError: names the field, what was found and what was expected.
        """
        counts = ("rank", "epochs", "batch_size", "accumulate", "save_every", "keep")
        least = dict.fromkeys(counts, 1) | {"length": 2, "warmup": 0, "weight_decay": 0, "clip": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {limit}.")
        for name in ("alpha", "learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0 and below 1.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {list(SCHEDULES)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: expected at least 1, or None for whole epochs.")

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return peft.scale(self.alpha, self.rank, self.rslora)

    def targets(self, config: ModelConfig) -> list[str]:
        """The names of the projections that learn."""
        return list(self.target_modules) or peft.target_names(config)

    def json(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return dataclasses.asdict(self) | {
            name: list(getattr(self, name)) for name in ("target_modules", "modules_to_save")
        }
