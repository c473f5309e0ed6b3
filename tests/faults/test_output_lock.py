"""Two runs in one output folder, and locks that runs left which are gone."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import train
from qsharded.distributed.world import World
from qsharded.training import output_lock
from qsharded.training.output_lock import LOCK_FILE, output_locked
from qsharded.utils.process_identity import ProcessIdentity
from tests.distributed.test_train import arguments

WORLD = World.single_process(torch.device("cpu"))


def write_lock(folder: Path, **changes: Any) -> Path:
    """A lock as another run left it: by default as a live process of this machine, the test's parent, holds it."""
    folder.mkdir(exist_ok=True)
    holder = ProcessIdentity.of(os.getppid()).to_json() | changes
    (folder / LOCK_FILE).write_text(json.dumps({"process": holder, "since": "noon"}))
    return folder / LOCK_FILE


def test_a_second_run_is_refused_by_name_and_the_first_keeps_its_lock(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = write_lock(tmp_path / "out")
    before = lock.read_bytes()
    with pytest.raises(SystemExit) as refused:
        train.main([*arguments(model, dataset, tmp_path / "out", max_steps=1), "--overwrite-output-dir"])
    assert refused.value.code == 1
    host = ProcessIdentity.of(os.getpid()).host
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'} is in use by another run: process {os.getppid()} on {host}, since noon" in said
    assert lock.read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def test_a_lock_is_held_meanwhile_and_leaves_nothing(tmp_path: Path) -> None:
    with output_locked(tmp_path / "new" / "out", WORLD):
        held = json.loads((tmp_path / "new" / "out" / LOCK_FILE).read_text())
        assert held["process"] == ProcessIdentity.of(os.getpid()).to_json()
        with pytest.raises(ValueError, match="is in use by another run"), output_locked(tmp_path / "new/out", WORLD):
            pass
        assert (tmp_path / "new" / "out" / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["ended", "its number used again", "a zombie"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path, kind: str) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    changes = {
        "ended": lambda: {"pid": ended_process()},
        "its number used again": lambda: {"started": ProcessIdentity.of(os.getppid()).started - 1},
        "a zombie": lambda: ProcessIdentity.of(zombie.pid).to_json(),
    }[kind]()
    zombie.communicate(b"\n") if kind != "a zombie" else end_unseen(zombie)
    write_lock(tmp_path, **changes)
    with output_locked(tmp_path, WORLD):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"]["pid"] == os.getpid()
    zombie.wait()
    assert list(tmp_path.iterdir()) == []


def end_unseen(process: subprocess.Popen) -> None:
    """Have it end, and do not look: it stays as a zombie."""
    process.stdin.close()
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


def test_a_lock_of_another_machine_holds_while_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "_TOUCH_S", 0.05)
    monkeypatch.setattr(output_lock, "_SILENT_S", 1.0)
    lock = write_lock(tmp_path, kernel="of another machine", host="node7")
    done = threading.Event()
    toucher = threading.Thread(target=touch_until, args=(lock, done))
    toucher.start()
    with pytest.raises(ValueError, match=r"process .* on node7"), output_locked(tmp_path, WORLD):
        pass
    done.set()
    toucher.join()
    with output_locked(tmp_path, WORLD):  # silent by now
        assert json.loads(lock.read_text())["process"]["pid"] == os.getpid()
        touched = lock.stat().st_mtime_ns
        while lock.stat().st_mtime_ns == touched:  # the test's time-out ends this where nobody touches it
            time.sleep(0.01)


def touch_until(path: Path, done: threading.Event) -> None:
    while not done.wait(0.05):
        os.utime(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"process": 7}', '{"process": {"pid": "x"}}'])
def test_a_damaged_lock_is_stale_once_nobody_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(output_lock, "_TOUCH_S", 0.01)
    monkeypatch.setattr(output_lock, "_SILENT_S", 0.05)
    (tmp_path / LOCK_FILE).write_text(text)
    with output_locked(tmp_path, WORLD):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"]["pid"] == os.getpid()
