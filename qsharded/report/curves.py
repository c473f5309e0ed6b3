"""Points of a curve, and the scale that they are drawn on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from qsharded.report.run_files import Point

_MOST_POINTS = 600  # of a curve: more than a screen has columns for
_ENOUGH_TO_SMOOTH = 30
_MAGNITUDES = 50  # times the smallest value: a scale by equal steps would show the small ones as nothing
_MARGIN = 1.3
_OUTLIER = 4.0  # times the range of the middle 96%: what is further off is not let squeeze the rest


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbours, near ones counting more; [] of too few to need it.

    They are a thirtieth of all on each side; at the ends both sides become shorter alike, so that the mean runs neither
    behind the curve nor ahead.
    """
    if len(points) < _ENOUGH_TO_SMOOTH:
        return []
    values = [value for _, value in points]
    for _ in range(2):  # twice: weights that fall with the distance, in place of a box that shows its edges
        values = _running_mean(values, max(2, len(points) // 60))
    return [(step, value) for (step, _), value in zip(points, values, strict=True)]


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    sums, mean = list(accumulate(values, initial=0.0)), []
    for number in range(len(values)):
        side = min(reach, number, len(values) - 1 - number)
        mean.append((sums[number + side + 1] - sums[number - side]) / (2 * side + 1))
    return mean


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most so many of them: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    width = 2 * len(points) / most
    kept: list[Point] = []
    for number in range(most // 2):
        stretch = points[round(number * width) : round((number + 1) * width)]
        low, high = (chosen(stretch, key=lambda point: point[1]) for chosen in (min, max))
        kept += sorted({low, high})
    return kept


@dataclass(frozen=True)
class Scale:
    """Where values lie between ``low`` and ``high``, 0 to 1, and the round numbers there; by logarithms if ``log``."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``, and within them whatever the value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return min(max((at - low) / (high - low), 0.0), 1.0)

    @classmethod
    def of(cls, values: Sequence[float], *, from_zero: bool = False, ticks: int = 5) -> "Scale":
        """For ``values``, of which there is one at least, with about so many ticks; a few far outliers are beyond."""
        low, high = _range(sorted(values))
        low = min(0.0, low) if from_zero else low
        if high <= low:
            high = low + (abs(low) or 1.0) * 0.1
        step = _round_step((high - low) / ticks)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, last * step, [number * step for number in range(first, last + 1)])

    @classmethod
    def of_magnitudes(cls, values: Sequence[float]) -> "Scale":
        """For values over several powers of ten, all above 0; for others as :meth:`of`."""
        least, most = min(values), max(values)
        if least <= 0 or most / least < _MAGNITUDES:
            return cls.of(values)
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
        every = -(-(last - first) // 6)
        ticks = [10.0**power for power in range(first, last + 1, every)]
        low, high = least / _MARGIN, most * _MARGIN
        return cls(low, high, [tick for tick in ticks if low <= tick <= high], log=True)


def _range(ordered: list[float]) -> tuple[float, float]:
    few = len(ordered) // 50
    inner_low, inner_high = ordered[few], ordered[-1 - few]
    room = _OUTLIER * (inner_high - inner_low)
    low = ordered[0] if inner_low - ordered[0] <= room else inner_low
    high = ordered[-1] if ordered[-1] - inner_high <= room else inner_high
    return low, high


def _round_step(step: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, the next one from ``step`` up."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= step * (1 - 1e-9))


def tick_text(value: float, scale: Scale) -> str:
    """A tick, as short as keeps it apart from the next one."""
    if scale.log:
        return f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    largest = max(abs(scale.low), abs(scale.high))
    if value == 0:
        return "0"
    if largest < 1e-2:
        return f"{value:.2g}" if value >= 1e-2 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    if largest >= 1e4:
        return f"{value / 1000:g}k"
    decimals = len(f"{scale.ticks[1] - scale.ticks[0]:.9f}".rstrip("0").partition(".")[2])
    return f"{value:.{decimals}f}"
