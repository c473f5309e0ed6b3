"""Learning rates as a function of the step alone, so that resuming needs no state."""

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, kind: str) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total_steps``.

    It climbs linearly over ``warmup_steps``, then stays ("constant") or falls to 0 at the end ("linear", or "cosine" as
    in Loshchilov and Hutter, arXiv:1608.03983).

    Raises:
        ValueError: an unknown ``kind``.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return peak * (1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2)
