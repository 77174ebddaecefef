"""A run's numbers, one JSON object a line, and their plot."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from qwen_jax.finetune.programs import Metrics

logger = logging.getLogger("qwen_jax")


class Recorder:
    """Writes `metrics.jsonl`, a line a step; after an interruption it goes on behind the step that is restored.

    Attributes:
        lines: what was written so far, lines of an earlier part of the run included.
    """

    def __init__(self, file: Path, done: int, tokens: int):
        self.file, self.tokens = file, tokens
        self.lines: list[dict[str, Any]] = []
        if done and file.is_file():
            old = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self.lines = [line for line in old if line["step"] <= done]
        file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        self._last = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """Notes a step that has ended; its line."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        line = {
            "step": step,
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "gradient_norm": float(metrics.gradient_norm),
            "learned_tokens": int(metrics.learned_tokens),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
        }
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return line

    def plot(self, file: Path) -> bool:
        """Draws the loss over the steps as a PNG; False, and a log line, where matplotlib is not installed."""
        try:
            from qwen_jax.plots.finetune import loss_curve
        except ModuleNotFoundError:
            logger.warning("%s: not drawn, matplotlib is missing; pip install matplotlib.", file)
            return False
        loss_curve(self.lines).savefig(file)
        return True
