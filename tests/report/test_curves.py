"""Scales, means and thinned curves, from their definitions."""

import math
import random

import pytest

from qsharded.report.curves import Scale, smoothed, thinned, tick_text


def test_a_scale_holds_its_values_and_has_round_ticks() -> None:
    scale = Scale.of([0.31, 1.94])
    assert scale.low <= 0.31 < 1.94 <= scale.high
    assert [tick_text(tick, scale) for tick in scale.ticks] == ["0", "0.5", "1.0", "1.5", "2.0"]
    assert all(
        math.isclose(a + scale.ticks[1] - scale.ticks[0], b) for a, b in zip(scale.ticks, scale.ticks[1:], strict=False)
    )
    assert (scale.place(scale.low), scale.place(scale.high)) == (0, 1)
    assert scale.place(scale.low + 0.25 * (scale.high - scale.low)) == pytest.approx(0.25)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0], [-1.0, -1.0]])
def test_equal_values_have_a_scale_too(values: list[float]) -> None:
    scale = Scale.of(values)
    assert scale.low <= values[0] <= scale.high
    assert scale.low < scale.high


def test_a_spike_does_not_squeeze_the_rest() -> None:
    values = [1.0 + 0.01 * (number % 7) for number in range(200)]
    assert Scale.of([*values, 1000.0]).high < 2
    assert Scale.of(values).high < 2
    assert Scale.of([1.0, 1000.0]).high >= 1000  # of two points neither is an outlier


def test_magnitudes_are_told_apart_where_values_have_them() -> None:
    scale = Scale.of_magnitudes([11.0, 1.0, 0.0005])
    assert [tick_text(tick, scale) for tick in scale.ticks] == ["0.001", "0.01", "0.1", "1", "10"]
    assert scale.place(1.0) - scale.place(0.1) == pytest.approx(scale.place(0.1) - scale.place(0.01))
    assert not Scale.of_magnitudes([2.0, 1.0]).log
    assert not Scale.of_magnitudes([2.0, 0.0]).log


def test_the_mean_of_a_line_is_the_line_and_noise_becomes_less() -> None:
    line = [(step, 3.0 - 0.01 * step) for step in range(200)]
    assert [value for _, value in smoothed(line)] == pytest.approx([value for _, value in line])
    draw = random.Random(0)
    noisy = [(step, value + draw.gauss(0, 0.1)) for step, value in line]
    off = [sum((a - b) ** 2 for (_, a), (_, b) in zip(curve, line, strict=True)) for curve in (smoothed(noisy), noisy)]
    assert off[0] < 0.35 * off[1]
    assert smoothed(line[:20]) == []


def test_a_thinned_curve_keeps_its_spikes_and_its_order() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321], points[777] = (4321.0, 9.0), (777.0, -9.0)
    kept = thinned(points, 100)
    assert {(4321.0, 9.0), (777.0, -9.0)} <= set(kept)
    assert len(kept) <= 100
    assert kept == sorted(kept)
    assert thinned(points[:50], 100) == points[:50]
