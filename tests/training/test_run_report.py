"""run.json, samples.jsonl and report.html of real runs: written at saves and at the end, and gone on with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qsharded
from qsharded import compare, train
from qsharded.report.run_files import Run, read_metrics
from qsharded.training import run_record, run_report
from qsharded.training.run_report import RunReport
from tests.report.test_pages import Checked
from tests.training.short_runs import short

EVALUATED = ["--eval-split", "0.05", "--eval-steps", "2", "--save-steps", "2", "--logging-steps", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, each logged."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train.main(short(folder, *EVALUATED))
    return folder


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_the_record_says_what_was_trained_on_what_and_where(whole: Path) -> None:
    record = record_of(whole)
    assert record["versions"]["qsharded"] == qsharded.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert (record["ranks"], record["nodes"], record["gpus"], record["plan"]) == (1, 1, [], None)
    assert (record["steps"], record["first_step"], record["rows_per_step"]) == (6, 0, 2)
    assert record["model"]["type"] == "llama"
    assert record["model"]["parameters"] > record["model"]["trained"] > 0
    training, held_out = record["data"]
    assert (training["rows"], held_out["rows"]) == (190, 10)
    assert training["tokens"] > training["trained_tokens"] > 0
    assert set(record["fingerprints"]) == {"base weights", "rows", "tokenizer"}


def test_the_report_holds_the_runs_last_figures_and_no_path(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    shown = Checked(text)
    loss = read_metrics(whole / "metrics.jsonl")[-2]["loss"]
    assert "finished: 6 steps" in shown.text
    assert f"{loss:.4g} loss" in shown.text
    for path in (str(whole), str(whole.parent), str(Path(qsharded.__file__).parent), str(Path.home()) + "/"):
        assert path not in text


def test_other_rows_have_another_fingerprint(whole: Path, tmp_path: Path) -> None:
    train.main(short(tmp_path / "out", *EVALUATED, "--train-on", "all"))
    prints, others = record_of(whole)["fingerprints"], record_of(tmp_path / "out")["fingerprints"]
    assert prints["base weights"] == others["base weights"]
    assert prints["rows"] != others["rows"]


def test_a_resumed_run_remembers_its_starts_and_its_time(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    before = read_metrics(out / "metrics.jsonl")
    again = ["--resume-from-checkpoint", str(out / "checkpoints" / "step-000002")]
    train.main(short(out, *EVALUATED, *again))
    record = record_of(out)
    assert record["first_step"] == 2
    assert [start["first_step"] for start in record["earlier_starts"]] == [0]
    assert "from step 2 on 1 ranks" in Checked((out / "report.html").read_text()).text
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in before]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[:4] == [row["seconds"] for row in before[:4]]


def test_a_save_brings_the_report_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(run_report, "page", lambda run: f"{seen.append(run.step) or ''}")
    train.main(short(tmp_path, "--save-steps", "2", "--logging-steps", "1"))
    assert seen[-1] == 6
    assert set(seen) & {2, 3, 4, 5}


def test_a_report_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(run: Run) -> str:
        raise RuntimeError("no page today")

    monkeypatch.setattr(run_report, "page", failing)
    train.main(short(tmp_path, "--save-steps", "2"))
    assert (tmp_path / "finished.json").is_file()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: no report.html: no page today"]


def test_other_ranks_write_no_report(tmp_path: Path) -> None:
    with RunReport(tmp_path, False) as report:
        report.has_steps()
        report.write_soon()
    assert list(tmp_path.iterdir()) == []


def test_runs_are_compared_from_the_command_line(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(short(tmp_path / "other", *EVALUATED, "--learning-rate", "1e-3", "--report-png"))
    assert (tmp_path / "other" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (whole / "report.png").exists()
    capsys.readouterr()
    words = ["--html", str(tmp_path / "c.html"), "--svg", str(tmp_path / "c.svg"), "--metric", "eval_loss"]
    words += ["--png", str(tmp_path / "c.png")]
    compare.main([str(whole), str(tmp_path / "other"), *words])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["settings", "that", "differ", "out", "other"], ["learning-rate", "0.0002", "0.001"]]
    assert "eval_loss by step" in (tmp_path / "c.svg").read_text()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "c.html").read_text()
    for words, said in (([str(whole)], "two runs or more"), ([str(whole), str(tmp_path)], "holds no run")):
        with pytest.raises(SystemExit):
            compare.main(words)
        assert said in capsys.readouterr().err


def test_a_png_that_nothing_can_draw_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needs = "needs a package that is not installed: pip install 'qsharded[report]'"
    with pytest.raises(SystemExit):
        train.main(short(tmp_path / "out", "--report-png"))
    assert f"--report-png {needs}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        compare.main(["no", "run", "--png", "c.png"])
    assert f"--png {needs}" in capsys.readouterr().err


def test_gpus_are_counted_by_kind() -> None:
    h200, a100 = {"name": "H200", "memory_gib": 140.0}, {"name": "A100", "memory_gib": 80.0}
    assert run_record._counted([h200, a100, h200]) == [h200 | {"count": 2}, a100 | {"count": 1}]
