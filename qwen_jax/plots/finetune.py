"""The course of a fine-tuning run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qwen_jax.plots.style import BLUE, GREY, figure

SMOOTHING = 0.9  # of the running mean; below 20 steps there is none


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and learning rate over the steps.

    Args:
        metrics: lines of `metrics.jsonl`, with step, loss and learning_rate.
    """
    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    with figure(2, width=9.0, height=3.2) as (drawing, axes):
        loss, rate = axes
        smooth = len(losses) >= 20
        loss.plot(steps, losses, color=GREY if smooth else BLUE, alpha=0.6 if smooth else 1.0)
        if smooth:
            loss.plot(steps, running_mean(losses), color=BLUE)
        loss.set(title="Loss of a learned token", xlabel="step", ylim=(0, None))
        rate.plot(steps, [line["learning_rate"] for line in metrics], color=BLUE)
        rate.set(title="Learning rate", xlabel="step", ylim=(0, None))
    return drawing


def running_mean(values: Sequence[float]) -> np.ndarray:
    """The exponential mean of what came so far, its start not pulled towards 0."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(total / weight)
    return np.asarray(means)
