"""Which evaluation was the best so far, and whether too many since then were no better. It goes on with the run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qsharded.checkpoint.resume import Progress
from qsharded.config import TrainConfig
from qsharded.config.evaluated import is_better_high


@dataclass(frozen=True)
class Best:
    """The best evaluation.

    Attributes:
        measure: as ``--save-best`` names it.
        value: of it.
        step: at which it was measured.
        no_better: evaluations since then.
    """

    measure: str
    value: float
    step: int
    no_better: int = 0

    @classmethod
    def of(cls, progress: Progress, measure: str | None) -> "Best | None":
        """What the progress says; None before the first evaluation, and where another measure was compared so far."""
        found = progress.best
        return cls(**found) if found and found["measure"] == measure else None


@dataclass(frozen=True)
class Judge:
    """Compares evaluations. All ranks have the same values, so all judge alike."""

    config: TrainConfig
    progress: Progress

    @property
    def best(self) -> Best | None:
        """So far."""
        return Best.of(self.progress, self.config.save_best)

    def is_best(self, values: Mapping[str, float]) -> bool:
        """Whether the measure is among what was measured now, after a step, and better than ever."""
        value, best = values.get(self.config.save_best or ""), self.best
        if value is None or value != value or self.progress.step == 0:
            return False
        return best is None or self._gain(value, best) > 0

    def note(self, values: Mapping[str, float], *, kept: bool) -> None:
        """Count an evaluation. ``kept``: it was the best, and its adapter is on the disk."""
        measure, best = self.config.save_best, self.best
        if measure is None or measure not in values or self.progress.step == 0:
            return
        value = values[measure]
        counts = best is None or self._gain(value, best) > self.config.early_stopping_threshold
        no_better = 0 if counts and kept else (best.no_better if best else 0) + 1
        if kept:
            self._keep(Best(measure, value, self.progress.step, no_better))
        elif best is not None:
            self._keep(Best(measure, best.value, best.step, no_better))

    def is_patience_out(self) -> bool:
        """Whether the run is to end, as so many evaluations were no better than the best one."""
        patience, best = self.config.early_stopping_patience, self.best
        return patience is not None and best is not None and best.no_better >= patience

    def _gain(self, value: float, best: Best) -> float:
        """By how much the value is better; of a NaN nothing."""
        gain = value - best.value if is_better_high(best.measure) else best.value - value
        return gain if gain == gain else -1.0

    def _keep(self, best: Best) -> None:
        kept: dict[str, Any] = asdict(best)
        self.progress.best = kept
