import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsharded.report.run_files import read_metrics
from qsharded.training.metrics import MetricsLog, TrainRow


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that goes as fast as the test tells it to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **values: Any) -> TrainRow:
    figures: dict[str, Any] = {
        "epoch": 0.5,
        "loss": 1.25,
        "grad_norm": 0.75,
        "learning_rate": 2e-4,
        "tokens_per_second": 1234.4,
        "memory_gib": 7.25,
        "skipped_steps": 0,
    }
    return TrainRow(step=step, **{**figures, **values})


def screen_of(text: str) -> list[str]:
    """What a terminal shows: a carriage return goes to the line's start, and what follows overwrites it."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda columns: monkeypatch.setenv("COLUMNS", str(columns))


def test_rows_are_valid_json_with_every_figure(tmp_path: Path) -> None:
    clock = Clock()
    with MetricsLog(tmp_path / "new" / "metrics.jsonl", 10, True, stream=io.StringIO(), clock=clock) as log:
        clock.now += 12.34
        log.train(row(1, loss=float("nan"), grad_norm=float("inf")))
        log.evaluation(1, 0.5, {"eval_loss": 2.0, "eval_perplexity": float("inf")})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    train, evaluation = (json.loads(line, parse_constant=refuse) for line in lines)
    assert train == {
        "step": 1,
        "epoch": 0.5,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 2e-4,
        "tokens_per_second": 1234.4,
        "memory_gib": 7.25,
        "skipped_steps": 0,
        "seconds": 12.3,
    }
    assert evaluation == {"step": 1, "epoch": 0.5, "eval_loss": 2.0, "eval_perplexity": None, "seconds": 12.3}


def test_samples_stand_beside_the_metrics_and_those_of_later_steps_go(tmp_path: Path) -> None:
    path, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    with MetricsLog(path, 10, True, stream=io.StringIO()) as log:
        log.train(row(1))
        assert not samples.exists()
        log.sample(2, "q", "a")
        log.sample(4, "q", "b", "c")
    kept, later = (
        {"step": 2, "prompt": "q", "answer": "a"},
        {"step": 4, "prompt": "q", "answer": "b", "reference": "c"},
    )
    assert read_metrics(samples) == [kept, later]
    with MetricsLog(path, 10, True, first_step=3, stream=io.StringIO()):
        pass
    assert read_metrics(samples) == [kept]
    with MetricsLog(path, 10, False, first_step=1, stream=io.StringIO()) as log:
        log.sample(5, "q", "a")
    assert read_metrics(samples) == [kept]


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 10, True, stream=io.StringIO())
    log.train(row(1))
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    log.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with MetricsLog(tmp_path / "metrics.jsonl", 10, False, stream=stream) as log:
        log.advance(1)
        log.train(row(1))
        log.evaluation(1, 0.5, {"eval_loss": 2.0})
        log.message("text")
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_resuming_drops_the_rows_of_steps_that_are_run_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 10, True, stream=io.StringIO()) as log:
        for step in (2, 4, 6):
            log.train(row(step, loss=float(step)))
    # A killed run leaves half a line.
    path.write_text(path.read_text() + '{"step": 7, "lo')
    with MetricsLog(path, 10, True, first_step=4, stream=io.StringIO()) as log:
        log.train(row(6, loss=60.0))
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    with MetricsLog(path, 10, True, stream=io.StringIO()):
        pass
    assert read_metrics(path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with MetricsLog(tmp_path / "m", 1000, True, stream=stream, clock=clock) as log:
        clock.now += 36.5
        log.advance(9)
        log.train(row(10))
        log.evaluation(10, 0.1, {"eval_loss": 2.0, "eval_perplexity": 7.389056})
        log.train(row(1000, skipped_steps=3))
    assert stream.getvalue().splitlines() == [
        "step   10/1000 loss 1.25 grad 0.75 lr 2.00e-04 tok/s 1234 mem 7.2G eta 1:00:13",
        "step   10/1000 eval_loss 2 eval_perplexity 7.389",
        "step 1000/1000 loss 1.25 grad 0.75 lr 2.00e-04 tok/s 1234 mem 7.2G skipped 3 eta 00:00",
    ]


def test_time_left_counts_from_the_step_that_the_run_resumed_at(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with MetricsLog(tmp_path / "m", 100, True, first_step=80, stream=stream, clock=clock) as log:
        log.train(row(80))
        clock.now += 10
        log.train(row(90))
    assert [line.rpartition(" eta ")[2] for line in stream.getvalue().splitlines()] == ["?", "00:10"]


@pytest.mark.parametrize("columns", [5, 40, 80, 100, 140, 200])
def test_the_bar_stays_on_one_line(tmp_path: Path, narrow: Callable[[int], None], columns: int) -> None:
    narrow(columns)
    stream = Terminal()
    with MetricsLog(tmp_path / "m", 200, True, stream=stream) as log:
        for step in range(1, 201):
            log.advance(step)
            if step % 50 == 0:
                log.train(row(step))
    shown = screen_of(stream.getvalue())
    assert len(shown) == 2
    assert shown[1] == ""
    assert len(shown[0]) < columns
    assert stream.getvalue().count("\n") == 1
    if columns >= 80:
        assert shown[0].startswith("100%|")
        for figure in ("| 200/200 [", ", loss 1.25 lr 2.00e-04 tok/s 1234 mem 7.2G]"):
            assert figure in shown[0]


def test_messages_and_evaluations_stand_above_the_bar(tmp_path: Path, narrow: Callable[[int], None]) -> None:
    narrow(120)
    stream = Terminal()
    with MetricsLog(tmp_path / "m", 4, True, stream=stream, clock=Clock()) as log:
        log.message("before")
        log.train(row(2))
        log.message("saved")
        log.evaluation(2, 0.5, {"eval_loss": 2.0})
    before, saved, evaluation, bar, end = screen_of(stream.getvalue())
    assert (before, saved, evaluation, end) == ("before", "saved", "step 2/4 eval_loss 2", "")
    assert bar.startswith(" 50%|")
    assert "| 2/4 [" in bar
    assert "loss 1.25" in bar


def test_a_shorter_bar_leaves_nothing_of_a_longer_one(tmp_path: Path, narrow: Callable[[int], None]) -> None:
    narrow(120)
    stream, clock = Terminal(), Clock()
    with MetricsLog(tmp_path / "m", 10, True, stream=stream, clock=clock) as log:
        clock.now += 100_000
        log.train(row(1, loss=123.4, skipped_steps=12345))
        clock.now = 100.0
        log.train(row(10))
    assert screen_of(stream.getvalue())[0].endswith("loss 1.25 lr 2.00e-04 tok/s 1234 mem 7.2G]")


def test_a_stream_that_cannot_write_a_character_gets_a_question_mark(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with MetricsLog(tmp_path / "m", 10, True, stream=io.TextIOWrapper(raw, encoding="ascii")) as log:
        log.message("caf\u00e9")
        assert raw.getvalue() == b"caf?\n"


SCRIPT = """
import sys
from qsharded.training.metrics import MetricsLog, TrainRow
with MetricsLog(sys.argv[1], 3000, True) as log:
    for step in range(1, 3001):
        log.train(TrainRow(step, 0.5, 1.0, 1.0, 1e-4, 100.0, 1.0, 0))
"""


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b""
    run.stderr.close()
    assert run.wait() == 0
    assert len(read_metrics(path)) == 3000


def test_a_real_terminal_gets_the_bar(tmp_path: Path) -> None:
    terminal, side = pty.openpty()
    with open(side, "w") as stream, MetricsLog(tmp_path / "m", 10, True, stream=stream) as log:
        log.train(row(5))
        shown = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert shown.startswith("\r")
    assert " 50%" in shown
    assert "5/10" in shown
