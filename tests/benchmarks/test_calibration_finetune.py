"""The benchmark of fine-tuning on calibrated bases, on a tiny model, and its verdict on figures that are given."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.calibration import __main__ as benchmark
from benchmarks.calibration import finetune, texts
from benchmarks.calibration.finetune import Tuned
from qsharded.checkpoint.calibration_record import CALIBRATION_FILE
from qsharded.report.run_files import Run

STEPS = 2


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["calibration", "finetune", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    return int(end.value.code or 0)


def write_text(path: Path, form: str) -> Path:
    path.write_text("".join(form.format(number) for number in range(600)))
    return path


def texts_of(rows: Path) -> list[str]:
    return [json.loads(line)["text"] for line in rows.read_text().splitlines()]


def test_each_base_is_swept_and_trained_with_every_seed_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "HELD_OUT_ROWS", 2)
    seen, unseen = (write_text(tmp_path / name, words) for name, words in (("a", "word {} "), ("b", "[{}], ")))
    flags = ["--model", model, "--calibration-text", seen, "--text", unseen, "--rows", 4, "--length", 32]
    flags += ["--bases", "compensated + residual adapter", "--rates", 1e-4, 1e-2, "--seeds", 2, "--steps", STEPS]
    flags += ["--batch", 1, "--folder", tmp_path / "folder", "--record", tmp_path / "record.json"]
    status = run(monkeypatch, *flags)
    record = json.loads((tmp_path / "record.json").read_text())
    assert status == (not all(record["checks"].values()))
    names = ["nearest", "compensated + residual adapter"]
    assert list(record["table"]) == names
    rates = {name: record["table"][name]["rate"] for name in names}
    found = [(row["base"], row["rate"], row["seed"]) for row in record["runs"]]
    assert found == [(n, r, 1) for n in names for r in (1e-4, 1e-2)] + [(n, rates[n], 2) for n in names]
    for row in record["runs"]:
        there = Run.read(tmp_path / "folder" / "runs" / f"{row['base']}, {row['rate']:g}, seed {row['seed']}")
        assert (there.step, there.finished) == (STEPS, True)
        assert (there.settings["learning-rate"], there.settings["seed"]) == (row["rate"], row["seed"])
        assert ("residual" in row["base"]) == (there.settings.get("lora-init") == "residual")
        assert there.last("eval_text0_loss") == row["after"][str(unseen)] != row["before"][str(unseen)]
    calibrated = {path.parent.name for path in tmp_path.glob(f"folder/bases/*/{CALIBRATION_FILE}")}
    assert calibrated == {"compensated"}
    trained, held_out = (texts_of(tmp_path / "folder" / "tuned" / f"{name}0.jsonl") for name in ("train", "text"))
    assert held_out
    assert "".join(trained).startswith("[0], [1], ")
    assert not any(text in "".join(trained) for text in held_out)
    # a second time everything is there
    metrics = {path: path.stat().st_mtime_ns for path in tmp_path.glob("folder/runs/*/metrics.jsonl")}
    run(monkeypatch, *flags)
    assert {path: path.stat().st_mtime_ns for path in metrics} == metrics
    assert json.loads((tmp_path / "record.json").read_text())["runs"] == record["runs"]


def tuned(base: str, rate: float, seed: int, *losses: float) -> Tuned:
    named = dict(zip(("C++", "Markdown"), losses, strict=True))
    return Tuned(base, rate, seed, {name: loss + 1 for name, loss in named.items()}, named)


def test_the_best_rate_is_each_bases_own() -> None:
    sweep = [tuned("nearest", 1e-4, 1, 2.0, 3.0), tuned("nearest", 1e-3, 1, 2.5, 2.4), tuned("other", 1e-4, 1, 1, 1)]
    assert finetune.best_rates(sweep) == {"nearest": 1e-3, "other": 1e-4}


def test_figures_are_of_the_texts_mean() -> None:
    of = finetune.figures([tuned("nearest", 1e-3, 1, 2.0, 3.0), tuned("nearest", 1e-3, 2, 2.5, 3.5)])
    sizes = {"before": 3.5, "losses": [2.5, 3.0], "loss": 2.75, "spread": 0.5}
    assert of == {"rate": 1e-3, "by_text": {"C++": 2.25, "Markdown": 3.25}} | sizes


@pytest.mark.parametrize(("loss", "spread", "holds"), [(1.9, 0.05, True), (1.9, 0.2, False), (1.97, 0.01, False)])
def test_a_base_must_be_better_by_more_than_either_spread(loss: float, spread: float, holds: bool) -> None:
    table = {"nearest": {"loss": 2.0, "spread": 0.04}, "compensated": {"loss": loss, "spread": spread}}
    assert list(finetune.verdicts(table).values()) == [holds]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--model", "folder", "--text", "C++") == 2
    assert "--calibration-text" in capsys.readouterr().err


def test_measured_rows_are_of_the_whole_part_that_is_not_trained_on(tmp_path: Path) -> None:
    text = "".join(f"{number:06d}" for number in range(20000))
    rows = texts.write_measured_rows(text, tmp_path / "rows", 60, 10).read_text().splitlines()
    starts = [texts.measured(text).index(json.loads(row)["text"]) for row in rows]
    assert starts == [place * 4800 for place in range(10)]  # 48,000 characters
