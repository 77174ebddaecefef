"""What quantization changed: perplexity, divergence from the float model and agreement of the most probable token."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.evaluate.perplexity import Window, windows

ROWS = 4  # windows that go through the cache side by side; their logits are held at once


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        model: folder or Hub id.
        kv_cache: "float" (as prefill computes keys and values), or "8-bit".
        weight_bytes: of the safetensors files (or of our own checkpoint's folder).
        perplexity: over the counted tokens.
        kl_divergence: mean Σ p·log(p / q) over the vocabulary, p the float model's distribution, in nats.
        top1_agreement: part of the positions whose most probable token is the float model's.
        tokens: counted positions.
        tokens_per_second: of decoding one row; None where it was not measured.
        peak_bytes: of loading and generating, see `footprint`; None where it was not measured.
    """

    model: str
    kv_cache: str
    weight_bytes: int
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    tokens_per_second: float | None = None
    peak_bytes: int | None = None


class Totals:
    """Sums over positions, in float64, of what two distributions have to do with each other and with the text."""

    def __init__(self):
        self.count, self.sums = 0, np.zeros(3)

    def add(self, reference_TV, logits_TV, ids_T) -> None:
        """Positions whose next tokens are `ids_T`.

        Raises:
            ValueError: logits that are not finite.
        """
        parts = np.asarray(_scores(jnp.asarray(reference_TV), jnp.asarray(logits_TV), jnp.asarray(ids_T)), np.float64)
        if not np.isfinite(parts).all():
            raise ValueError("The model's logits are not finite; load it with dtype bfloat16 or float32.")
        self.sums += parts.sum(axis=1)
        self.count += parts.shape[1]

    def result(self, model: str, kv_cache: str, weight_bytes: int) -> Comparison:
        """The means."""
        loss, divergence, agreement = (float(each) / self.count for each in self.sums)
        return Comparison(model, kv_cache, weight_bytes, math.exp(loss), max(divergence, 0.0), agreement, self.count)


@jax.jit
def _scores(reference_TV, logits_TV, ids_T):
    """float32 [3, T]: negative log-likelihood, divergence, agreement."""
    log_p_TV = jax.nn.log_softmax(reference_TV.astype(jnp.float32), axis=-1)
    log_q_TV = jax.nn.log_softmax(logits_TV.astype(jnp.float32), axis=-1)
    loss_T = -jnp.take_along_axis(log_q_TV, ids_T[:, None], axis=-1)[:, 0]
    divergence_T = jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV), axis=-1)
    agreement_T = (jnp.argmax(reference_TV, axis=-1) == jnp.argmax(logits_TV, axis=-1)).astype(jnp.float32)
    return jnp.stack([loss_T, divergence_T, agreement_T])


def compare(
    reference: str | Path,
    models: Sequence[str | Path],
    ids,
    *,
    window: int = 1024,
    limit: int | None = None,
    kv_cache: Sequence[str] = ("float", "8-bit"),
    dtype: str = "auto",
    use: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[Comparison]:
    """Compares models with a float one on a text; the float model is in memory with one other at a time.

    Args:
        reference: the float model; its own line comes first.
        models: others of the same vocabulary.
        ids: token ids of the text.
        window: tokens a window; windows do not overlap, see `perplexity`.
        limit: only the first so many tokens.
        kv_cache: "float" and "8-bit": how keys and values are kept. The 8-bit lines take a decode step for every
            position of a window, which is far slower.
        dtype: of activations, as in `from_pretrained`.
        use: also measure each one's decode speed and peak memory, alone and before the comparison.
        progress: called with what is being measured, the tokens counted so far and their number.
    """
    from qwen_jax.causal_lm import QwenForCausalLM
    from qwen_jax.checkpoint_store import find

    if unknown := set(kv_cache) - {"float", "8-bit"}:
        raise ValueError(f"kv_cache holds {sorted(unknown)}, expected 'float' and '8-bit'.")
    ids = np.asarray(ids, np.int32).reshape(-1)[:limit]
    parts = windows(len(ids), window)
    taken = _footprints((reference, *models), kv_cache, dtype, progress) if use else {}
    exact = QwenForCausalLM.from_pretrained(reference, dtype=dtype)
    rows = []
    for name in (reference, *models):
        for kind in kv_cache:
            step = f"{Path(name).name}, {kind} KV cache"
            quantized = kind == "8-bit"
            model = exact
            if quantized or name != reference:
                model = QwenForCausalLM.from_pretrained(name, dtype=dtype, use_cache_quantization=quantized)
            if model.config.vocab_size != exact.config.vocab_size:
                raise ValueError(
                    f"{name}: has {model.config.vocab_size} logits, expected {exact.config.vocab_size} as {reference}."
                )
            totals = Totals()
            for part, logits_TV in _cached(model, ids, parts) if quantized else _prefilled(model, ids, parts):
                inputs = ids[None, part.start : part.stop]
                reference_TV = logits_TV if model is exact else exact(inputs)[0, : part.stop - part.start - 1]
                totals.add(reference_TV, logits_TV, ids[part.first : part.stop])
                progress(step, totals.count, sum(each.stop - each.first for each in parts))
            speed, peak = taken.get((name, kind), (None, None))
            row = totals.result(str(name), kind, weight_bytes(find(name)))
            rows.append(dataclasses.replace(row, tokens_per_second=speed, peak_bytes=peak))
            del model
    return rows


def _footprints(names, kv_cache, dtype, progress) -> dict[tuple[str | Path, str], tuple[float, int | None]]:
    """Speed and memory of each model and cache, the smallest first."""
    from qwen_jax.checkpoint_store import find
    from qwen_jax.evaluate.footprint import footprint

    cases = [(name, kind) for name in names for kind in kv_cache]
    cases.sort(key=lambda case: (weight_bytes(find(case[0])), case[1] == "float"))
    taken = {}
    for number, (name, kind) in enumerate(cases):
        taken[name, kind] = footprint(name, kind == "8-bit", dtype)
        progress("Speed and memory", number + 1, len(cases))
    return taken


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    files = list(folder.glob("*.safetensors")) or [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _prefilled(model, ids, parts: list[Window]) -> Iterator[tuple[Window, jax.Array]]:
    for part in parts:
        yield part, model(ids[None, part.start : part.stop])[0, : part.stop - part.start - 1]


def _cached(model, ids, parts: list[Window]) -> Iterator[tuple[Window, np.ndarray]]:
    """Logits through the cache: one prefilled token, then decode steps, windows of equal length side by side."""
    for length in sorted({part.stop - part.start for part in parts}, reverse=True):
        alike = [part for part in parts if part.stop - part.start == length]
        for begin in range(0, len(alike), ROWS):
            batch = alike[begin : begin + ROWS]
            rows_BT = np.stack([ids[part.start : part.stop] for part in batch])
            logits_B1V, cache = model.prefill(rows_BT[:, :1])
            steps = [np.asarray(logits_B1V[:, 0])]
            for position in range(1, length - 1):
                logits_B1V, cache = model.decode(rows_BT[:, position : position + 1], cache)
                steps.append(np.asarray(logits_B1V[:, 0]))
            for row, part in enumerate(batch):
                yield part, np.stack([step[row] for step in steps])
