"""The benchmark of calibration, at a size that takes a moment."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.calibration import __main__ as benchmark
from benchmarks.calibration import quality, texts


@pytest.mark.parametrize("shape", ["tiny", "tiny-mixture"])
def test_speed_of_a_tiny_shape_is_recorded(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    flags = ["speed", "--shape", shape, "--layers", "1", "--rows", "2", "--length", "16", "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["calibration", *flags])
    with pytest.raises(SystemExit):
        benchmark.main()
    read = json.loads(record.read_text())
    # a model of two layers, of which one was measured
    assert read["minutes_of_the_model"] == pytest.approx(2 * read["seconds_measured"] / 60, abs=0.01)
    assert read["checks"]


def test_what_is_measured_is_not_calibrated_on(tmp_path: Path) -> None:
    text = "".join(f"{number:06d}" for number in range(20000))
    rows = [json.loads(line)["text"] for line in texts.write_rows(text, tmp_path / "rows").read_text().splitlines()]
    assert "".join(rows) + texts.measured(text) == text


def test_bounds_are_parts_of_nearests_figures_in_the_worst_domain() -> None:
    def domain(*kl: float) -> dict[str, dict[str, float]]:
        names = ("fp32", "nearest", *quality.MOST_KL)
        figures = zip(names, kl, (10.0, 14.0, 12.0, 11.0, 10.5), strict=True)
        return {name: {"KL": value, "perplexity": perplexity} for name, value, perplexity in figures}

    held = quality.bounds({"prose": domain(0, 1, 0.5, 0.3, 0.2), "C++": domain(0, 2, 1.1, 0.6, 0.4)})
    assert all(held.values())
    missed = quality.bounds({"prose": domain(0, 1, 0.5, 0.3, 0.2), "C++": domain(0, 2, 1.1, 0.66, 0.4)})
    assert [name.split(":")[0] for name, holds in missed.items() if not holds] == ["KL of compensated"]
