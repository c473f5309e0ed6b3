"""Optimizers and learning-rate schedules. Every optimizer has ``prefetch()`` and ``step(grad_scale=...)``."""

from qsharded.optim.adamw import AdamW
from qsharded.optim.paged_adamw8bit import PagedAdamW8bit, clipping_scale

ScaledOptimizer = AdamW | PagedAdamW8bit
"""What the trainer works with."""

__all__ = ["AdamW", "PagedAdamW8bit", "ScaledOptimizer", "clipping_scale"]
