"""A bar on a terminal, lines elsewhere; and that loading, quantizing and tokenizing show them."""

import io
import os
from pathlib import Path

import pytest
import torch

from qsharded.checkpoint.load import load_model
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.utils import collectives, progress_bar
from qsharded.utils.progress_bar import ProgressBar
from tests.checkpoints import write_checkpoint


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO) -> list[str]:
    """Every state of the line, in order."""
    return [part.strip() for part in stream.getvalue().split("\r") if part.strip()]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "_DELAY_S", 0)
    monkeypatch.setattr(progress_bar._Bar, "__init__", _eager(progress_bar._Bar.__init__))
    monkeypatch.setenv("COLUMNS", "100")


def _eager(init):
    return lambda self, *args, **how: init(self, *args, **how, mininterval=0)


@pytest.mark.usefixtures("at_once")
def test_a_terminal_has_a_bar_that_is_drawn_over_and_goes_when_all_is_done() -> None:
    stream = Terminal()
    with ProgressBar("reading", 4096, done=1024, stream=stream) as bar:
        bar.reach(2048, "12 rows")
        bar.message("a line")
        bar.advance(2048)
    shown = drawn(stream)
    assert [line.partition("|")[0] for line in shown if line.startswith("reading")][-1] == "reading: 100%"
    assert any("2.00k/4.00k" in line and "12 rows" in line for line in shown)
    assert "\ra line\n" in stream.getvalue()
    assert stream.getvalue().endswith("\r")  # the last thing is an empty line


def test_a_terminal_that_tells_no_size_has_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()  # of 0 rows and columns, as a program or a container makes them
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    with os.fdopen(ours, "rb", 0) as seen, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with ProgressBar("reading", 4, " rows", stays=True) as bar:
            bar.reach(4)
        terminal.flush()
        os.set_blocking(seen.fileno(), False)
        assert "reading: 100%" in (seen.read(10_000) or b"").decode()


def test_a_file_has_a_line_now_and_then() -> None:
    now, log = [0.0], io.StringIO()
    bar = ProgressBar("reading", 1000, " rows", done=100, stream=log, clock=lambda: now[0])
    for second in range(26):
        now[0] = second
        bar.reach(100 + 20 * second, "so far")
    bar.close()
    assert log.getvalue().splitlines() == [
        "reading:  30% 300/1000 [00:10<00:35, 20.00 rows/s, so far]",
        "reading:  50% 500/1000 [00:20<00:25, 20.00 rows/s, so far]",
    ]
    assert bar.seconds() == 25


def test_what_is_done_soon_shows_nothing() -> None:
    for stream in (Terminal(), io.StringIO()):
        with ProgressBar("reading", 10, stream=stream) as bar:
            bar.advance(10)
        assert stream.getvalue().strip() == ""


@pytest.mark.usefixtures("at_once")
def test_loading_and_quantizing_show_a_bar_that_reaches_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path, shards=3)
    (tmp_path / "packed").mkdir()
    cpu = torch.device("cpu")
    for title, work in (
        ("loading the model", lambda: load_model(source)),
        ("quantizing", lambda: quantize_checkpoint(source, tmp_path / "packed", "qsharded", cpu)),
        ("loading the model", lambda: load_model(tmp_path / "packed")),
    ):
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        work()
        lines = [line for line in drawn(stream) if line.startswith(title)]
        assert len(lines) > 10
        assert lines[-1].startswith(f"{title}: 100%|")
        assert max(line.count("100%") for line in lines[: len(lines) // 2]) == 0


@pytest.mark.usefixtures("at_once")
def test_other_ranks_show_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(collectives, "rank", lambda group: 1)
    load_model(write_checkpoint(tmp_path))
    assert stream.getvalue() == ""
