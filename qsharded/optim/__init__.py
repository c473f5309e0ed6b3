"""Optimizers and learning-rate schedules."""

from qsharded.optim.paged_adamw8bit import PagedAdamW8bit, clipping_scale

__all__ = ["PagedAdamW8bit", "clipping_scale"]
