"""Signals to commands as real processes: one line, the right exit status, nothing that only looks complete."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from qsharded.utils import signals
from qsharded.utils.signals import _Listener
from tests.processes import Command, script


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("train", signal.SIGINT),
        ("train", signal.SIGTERM),
        ("generate", signal.SIGINT),
        ("merge", signal.SIGUSR2),
        ("quantize", signal.SIGHUP),
    ],
)
def test_a_signal_in_the_midst_of_the_imports_ends_with_one_line(command: str, number: signal.Signals) -> None:
    run = Command(["-X", "importtime", "-m", f"qsharded.{command}", "--help"])
    run.wait_for("numpy")  # long before torch is there
    run.signal(number)
    assert run.end() == 128 + number
    (line,) = [line for line in run.lines if not line.startswith("import time:")]
    assert line.startswith(f"qsharded.{command}: stopped by {number.name}")


# The main thread stays in a call into C, as in a collective or a download, where Python runs no handlers.
BUSY = """
import contextlib, ctypes, signal, sys
from qsharded.utils import signals
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
signals.take_over("qsharded.train", " before its first step")
if "noting" in sys.argv:
    signals.note_from_now()
if "stuck" in sys.argv:
    signals._STUCK_S = 0.5
with signals.ending(" during the upload") if "ending" in sys.argv else contextlib.nullcontext():
    print("busy", flush=True)
    ctypes.CDLL(None).sleep(1000)
"""


def test_a_long_call_into_c_is_left_at_once(tmp_path: Path) -> None:
    run = Command([script(tmp_path, BUSY)])
    run.wait_for("busy")
    run.signal(signal.SIGINT)
    assert run.end() == 130
    assert run.lines[1:] == ["qsharded.train: stopped by SIGINT before its first step"]


def test_the_end_of_the_terminal_is_none_under_nohup(tmp_path: Path) -> None:
    run = Command([script(tmp_path, BUSY), "nohup"])
    run.wait_for("busy")
    run.signal(signal.SIGHUP)
    run.signal(signal.SIGTERM)
    assert run.end() == 143


def test_a_second_signal_ends_what_the_first_one_let_finish(tmp_path: Path) -> None:
    run = Command([script(tmp_path, BUSY), "noting"])
    run.wait_for("busy")
    while run.process.poll() is None:  # those that come close on each other are one
        run.signal(signal.SIGTERM)
        time.sleep(0.05)
    assert run.end() == 143
    assert run.lines[1:] == ["qsharded.train: a second signal, SIGTERM: leaving at once, what was being saved is lost"]


def test_what_may_end_at_once_does_though_signals_are_noted_before_and_after(tmp_path: Path) -> None:
    run = Command([script(tmp_path, BUSY), "noting", "ending"])
    run.wait_for("busy")
    run.signal(signal.SIGTERM)
    assert run.end() == 143
    assert run.lines[1:] == ["qsharded.train: stopped by SIGTERM during the upload"]


def test_a_rank_whose_collective_never_ends_leaves_before_torchrun_kills_it(tmp_path: Path) -> None:
    """NCCL waits for minutes for a rank that was killed, and torchrun kills the others without a word after 30 s."""
    assert signals._STUCK_S < 25
    run = Command([script(tmp_path, BUSY), "noting", "stuck"])
    run.wait_for("busy")
    run.signal(signal.SIGTERM)
    assert run.end() == 143
    (line,) = run.lines[1:]
    assert "did not end within 0.5 s, as when another rank has died; leaving without saving" in line


def test_a_rank_that_knows_of_the_signal_has_all_the_time_that_saving_takes() -> None:
    listener = _Listener()
    listener.answer = listener.answer.NOTE
    listener._receive(signal.SIGTERM, from_launcher=True)
    listener._asked_at = {True: time.monotonic() - 1000}
    assert listener._is_stuck()
    listener.is_heard = True
    assert not listener._is_stuck()


class Gone(Exception):
    pass


def test_what_torchrun_hands_on_is_no_second_signal_but_its_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm and systemd signal torchrun and its ranks alike; under load torchrun's own comes seconds later."""
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))

    def leave(self: _Listener, *_: object) -> None:
        raise Gone

    monkeypatch.setattr(_Listener, "leave", leave)
    for senders, is_left in [((False, True), False), ((False, False), True), ((False, True, True), True)]:
        listener = _Listener()
        listener.answer = listener.answer.NOTE
        with pytest.raises(Gone) if is_left else contextlib.nullcontext():
            for from_launcher in senders:
                listener._receive(signal.SIGTERM, from_launcher=from_launcher)
        assert listener.noted is signal.SIGTERM


@pytest.mark.parametrize(("how", "ends"), [("failed:74", ("", 74)), ("15", ("stopped by SIGTERM, too soon", 143))])
def test_torchruns_signal_after_another_ranks_end_is_not_told_as_one_of_the_users(
    monkeypatch: pytest.MonkeyPatch, how: str, ends: tuple[str, int]
) -> None:
    def leave(status: int) -> None:
        raise Gone(status)

    said = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(signals, "say", lambda _, text: said.append(text))
    monkeypatch.setattr(signals._listener, "meanwhile", ", too soon")
    monkeypatch.setattr(signals._listener, "look", lambda: how)
    with pytest.raises(Gone) as gone:
        signals._listener._receive(signal.SIGTERM, from_launcher=True)
    assert ("".join(said), gone.value.args[0]) == ends


# Half of the work is written when the signal comes.
HALF_WRITTEN = """
import sys, time
from pathlib import Path
from qsharded.utils import signals
signals.take_over("qsharded.{command}", "; --output was not written")
from qsharded import {command}

def half(*given):
    folder = next(path for path in given if path.name.startswith(".out."))
    (folder / "model.safetensors").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(1000)

{command}.{function} = half
for name in ("find_checkpoint", "find_adapter", "tokenizer_folder", "log_base_note"):
    setattr({command}, name, lambda *_, **__: Path("found"))
{command}.main()
"""


@pytest.mark.parametrize(
    ("command", "function", "options", "number"),
    [
        ("quantize", "write_packed", [], signal.SIGINT),
        ("merge", "merge_weights", ["--adapter=a"], signal.SIGTERM),
    ],
)
def test_nothing_is_left_of_a_checkpoint_that_is_half_written(
    tmp_path: Path, command: str, function: str, options: list[str], number: signal.Signals
) -> None:
    source = script(tmp_path, HALF_WRITTEN.format(command=command, function=function))
    run = Command([source, "--model=m", f"--output={tmp_path / 'written' / 'out'}", *options])
    run.wait_for("half")
    run.signal(number)
    assert run.end() == 128 + number
    assert run.lines[1:] == [f"qsharded.{command}: stopped by {number.name}; --output was not written"]
    assert list((tmp_path / "written").iterdir()) == []
