"""A plan's meshes side by side: memory of a chip, and the speed that cannot be exceeded."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from qwen_jax.plan.plan import Plan
from qwen_jax.plots.style import BLUE, GREY, INK, ORANGE, figure, note


def meshes(plans: Sequence[Plan], title: str) -> Figure:
    """Two panels, a bar a mesh: what a chip holds against what it has, and tokens/s at best.

    Args:
        plans: of `qwen_jax.plan.plan.plans`, at least one.
        title: model, chips and batch.
    """
    names = [
        f"data {plan.data} × model {plan.model}" + (f" × sequence {plan.sequence}" if plan.sequence > 1 else "")
        for plan in plans
    ]
    places = range(len(plans))
    with figure(2, height=0.55 * len(plans) + 1.9) as (drawing, (memory, speed)):
        weights, cache = ([getattr(plan, part) / 1e9 for plan in plans] for part in ("weights", "cache"))
        memory.barh(places, weights, color=BLUE, height=0.62, label="weights")
        memory.barh(places, cache, left=weights, color=ORANGE, height=0.62, label="KV cache")
        memory.axvline(plans[0].memory / 1e9, color=INK, linestyle=":", label="memory of a chip")
        memory.set(title="Memory of each chip", xlabel="GB")
        memory.set_yticks(places, names)
        memory.legend(loc="best")
        rates = [plan.tokens_per_second for plan in plans]
        bars = speed.barh(places, rates, color=[BLUE if plan.fits else GREY for plan in plans], height=0.62)
        words = [
            f"{rate:,.0f}" + ("" if plan.fits else ", does not fit") for rate, plan in zip(rates, plans, strict=True)
        ]
        speed.bar_label(bars, words, padding=3)
        speed.set(title="Speed of all rows, at best", xlabel="decode, tokens/s", xlim=(0, max(rates) * 1.4))
        speed.set_yticks(places, [""] * len(plans))
        for axis in (memory, speed):
            axis.invert_yaxis()
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", visible=False)
        note(drawing, f"{title}. Computed from shapes and data sheets, not measured.")
    return drawing
