"""``--profile``: what the host and the device did in some steps, as a Chrome trace for each rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from qsharded.config import TrainConfig
from qsharded.distributed.world import World

_WARM_UP = 1  # steps that are recorded and thrown away, as the first recorded one is slow


class Profiler(Protocol):
    """What is told of every step."""

    def step(self) -> None:
        """Another step was given to the device."""


class _Nothing:
    def step(self) -> None:
        """Nothing is recorded."""


@contextmanager
def profiled(config: TrainConfig, world: World, done: int) -> Iterator[Profiler]:
    """Records the steps that ``config.profile`` names, of a run that has ``done`` so many, into the output folder."""
    if config.profile is None or config.profiled_steps[0] <= done:
        yield _Nothing()
        return
    first, last = config.profiled_steps
    ahead = first - 1 - done
    warm_up = min(_WARM_UP, ahead)
    schedule = torch.profiler.schedule(wait=ahead - warm_up, warmup=warm_up, active=last - first + 1, repeat=1)
    path = Path(config.output_dir, "profile", f"rank{world.rank}.json.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda profile: profile.export_chrome_trace(str(path))
    ) as profiler:
        yield profiler
