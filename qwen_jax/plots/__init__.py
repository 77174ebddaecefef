"""Figures of the notebooks and the documentation; they need matplotlib (`pip install 'qwen-jax[notebooks]'`).

Each function returns a `matplotlib.figure.Figure` that is closed already: a notebook shows it once, a script saves it.
"""

from qwen_jax.plots.kv_cache import cache_measurements, published_cache_memory
from qwen_jax.plots.matmul import packed_word, roofline
from qwen_jax.plots.quantization import quantization
from qwen_jax.plots.sharding import meshes

__all__ = ["cache_measurements", "meshes", "packed_word", "published_cache_memory", "quantization", "roofline"]
