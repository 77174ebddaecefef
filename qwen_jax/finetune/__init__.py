"""Fine-tuning with LoRA beside frozen weights, float or packed; folding what was learned into a float checkpoint."""

from qwen_jax.finetune.data import Dataset, Example, collect, read_dataset
from qwen_jax.finetune.merge import MergeReport, merge
from qwen_jax.finetune.run import FinetuneReport, finetune
from qwen_jax.finetune.settings import FinetuneSettings

__all__ = [
    "Dataset",
    "Example",
    "FinetuneReport",
    "FinetuneSettings",
    "MergeReport",
    "collect",
    "finetune",
    "merge",
    "read_dataset",
]
