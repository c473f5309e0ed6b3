"""The writer on one rank: what it saves and when, how its errors are told, and a death at every moment."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from qsharded.checkpoint import background_writer, files
from qsharded.checkpoint.background_writer import CheckpointNotWritten, CheckpointWriter
from qsharded.checkpoint.intact import newest_sound
from qsharded.checkpoint.manifest import read_manifest, verify
from qsharded.checkpoint.resume import Progress, checkpoints, load_checkpoint, read_progress, refuse_other
from qsharded.checkpoint.retention import drop_partial_checkpoints
from qsharded.checkpoint.training_state import own_weights
from qsharded.config import TrainConfig
from qsharded.distributed.world import World
from qsharded.nn import LoRAConfig
from qsharded.training.watchdog import collective_timeout
from qsharded.utils.untrusted_json import read_json

LORA = LoRAConfig(r=2, target_modules=["layer"])
WORLD = World.single_process(torch.device("cpu"))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)


def make(value: float) -> tuple[nn.Module, Optimizer]:
    """A model of which all weights are ``value``, and an optimizer of which all state is 10 * ``value``."""
    model = Tiny()
    optimizer = AdamW(model.parameters())
    fill(model, optimizer, value)
    return model, optimizer


def fill(model: nn.Module, optimizer: Optimizer, value: float) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(value)
        state = {"step": torch.tensor(10 * value)}
        state |= {what: torch.full_like(parameter, 10 * value) for what in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = state


def save(to: CheckpointWriter, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    to.save(model, LORA, optimizer, Progress(step=step, window={"loss": step / 3}), base_model="base")


def write(folder: Path, step: int, keep: int | None = None) -> None:
    """A checkpoint whose tensors tell its step, the last one of a run."""
    with CheckpointWriter(folder, WORLD, keep) as to:
        save(to, *make(float(step)), step)
        to.wait()
        to.keep_newest()


def assert_holds(folder: Path, step: int) -> None:
    model, optimizer = make(-1.0)
    load_checkpoint(folder, model, LORA, optimizer)
    assert read_progress(folder) == Progress(step=step, window={"loss": step / 3})
    for parameter in model.parameters():
        assert (parameter == step).all()
        state = optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all((value == 10 * step).all() for value in state.values())
        assert (state["step"].shape, state["exp_avg"].shape) == ((), parameter.shape)


def test_a_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    write(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "step-000003"
    assert (verify(folder).step, verify(folder).world_size) == (3, 1)
    assert_holds(folder, 3)
    listed = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert listed == {"manifest.json", *verify(folder).files}


def test_saving_does_not_wait_and_keeps_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread stands still until the model has long changed; a second checkpoint waits for the first."""
    go, write_tensors = threading.Event(), files.write_tensors
    monkeypatch.setattr("qsharded.checkpoint.training_state.write_tensors", lambda *a: go.wait() and write_tensors(*a))
    model, optimizer = make(1.0)
    with CheckpointWriter(tmp_path, WORLD, None) as to:
        save(to, model, optimizer, 1)
        fill(model, optimizer, 2.0)
        to.check()
        assert checkpoints(tmp_path) == []
        threading.Timer(0.2, go.set).start()
        save(to, model, optimizer, 2)
        assert_holds(checkpoints(tmp_path)[0], 1)
    assert_holds(checkpoints(tmp_path)[1], 2)


@pytest.mark.gpu
def test_what_a_gpu_holds_is_copied_before_it_changes(tmp_path: Path) -> None:
    """The copies are only queued when save returns, behind work that takes the GPU a while."""
    model, optimizer = make(0.0)
    model.cuda()
    busy = torch.randn(8192, 8192, device="cuda")
    with CheckpointWriter(tmp_path, World.single_process(torch.device("cuda", 0)), None) as to:
        for step in (1, 2):
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            fill(model, optimizer, float(step))
            save(to, model, optimizer, step)
            fill(model, optimizer, -1.0)
    for step in (1, 2):
        assert_holds(checkpoints(tmp_path)[step - 1], step)


def failing(*args: Any) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("call", ["check", "save", "exit"])
def test_an_error_of_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("qsharded.checkpoint.training_state.write_tensors", failing)
    to = CheckpointWriter(tmp_path, WORLD, None)
    save(to, *make(1.0), 1)
    calls: dict[str, Callable[[], object]] = {
        "check": lambda: [to.check() for _ in iter(lambda: to._pending.done(), True)] + [to.check()],
        "save": lambda: save(to, *make(2.0), 2),
        "exit": lambda: to.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointNotWritten, match=r"step-000001 was not written: .*Input/output error"):
        calls[call]()
    to.wait()  # it was told once
    assert checkpoints(tmp_path) == []


def test_another_error_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qsharded.checkpoint.training_state.write_tensors", failing)
    with pytest.raises(KeyError), CheckpointWriter(tmp_path, WORLD, None) as to:  # noqa: PT012
        save(to, *make(1.0), 1)
        raise KeyError
    assert "Input/output error" in capsys.readouterr().err


def test_a_rank_that_never_writes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "_PATIENCE_S", 0.1)
    with (
        pytest.raises(CheckpointNotWritten, match=r"rank 1 did not write .*rank-00001\.json"),
        CheckpointWriter(tmp_path, World(0, 2, torch.device("cpu"), None), None) as to,
    ):
        save(to, *make(1.0), 1)


def test_the_wait_for_other_ranks_ends_before_they_time_out_in_a_collective() -> None:
    """Else NCCL or the watchdog ends the ranks that wait for the main one, and nobody reads which disk was slow."""
    config = TrainConfig(model="m", dataset="d")
    shortest = collective_timeout(replace(config, hang_timeout=0.01))
    assert shortest is not None
    assert background_writer._PATIENCE_S < shortest.total_seconds() == 600
    assert config.hang_timeout * 60 > background_writer._PATIENCE_S


def test_an_error_on_its_way_waits_for_no_rank_that_may_be_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError), CheckpointWriter(tmp_path, World(0, 2, WORLD.device, None), None) as to:  # noqa: PT012
        save(to, *make(1.0), 1)
        raise KeyError
    assert capsys.readouterr().err == ""
    assert checkpoints(tmp_path) == []


def test_all_ranks_wait_for_a_slow_disk_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of training's collectives: they ask each other after the wait and before anything is copied."""
    calls, first_error = [], background_writer.first_error

    def waiting(world: World, error: Exception | None) -> str | None:
        calls.append([path.name for path in checkpoints(tmp_path)])
        return first_error(world, error)

    monkeypatch.setattr(background_writer, "first_error", waiting)
    monkeypatch.setattr(background_writer, "own_weights", lambda *args: calls.append("copied") or own_weights(*args))
    with CheckpointWriter(tmp_path, WORLD, None) as to:
        save(to, *make(1.0), 1)
        save(to, *make(2.0), 2)
    assert calls == [[], "copied", ["step-000001"], "copied"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, step, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000003", "step-000004"}


def die_at(moment: int) -> None:
    """Kill this process instead of its n-th call that has to do with the order on the disk.

    What was not yet synchronized is lost in part, as after a power cut.
    """
    calls = iter(range(moment + 1))
    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, _deadly(name, getattr(os, name), calls, moment))


def _deadly(name: str, call: Callable[..., Any], calls: Any, moment: int) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == moment:
            if name == "fsync" and not os.path.isdir(f"/proc/self/fd/{args[0]}"):
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def dies_while_writing(folder: Path, moment: int) -> bool:
    """Whether a process that writes the checkpoint of step 2, over one of step 1, dies at that moment."""
    child = os.fork()
    if child == 0:
        die_at(moment)
        write(folder, 2, keep=1)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_death_at_any_moment_leaves_a_valid_checkpoint_and_none_that_only_looks_so(tmp_path: Path) -> None:
    found, moment, died = [], 0, True
    while died:
        run = tmp_path / str(moment)
        write(run, 1)
        died = dies_while_writing(run, moment)
        newest = newest_sound(run, print)
        assert newest is not None
        for folder in checkpoints(run):
            verify(folder)
        found.append(int(newest.name[-1]))
        assert_holds(newest, found[-1])
        drop_partial_checkpoints(run)
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {"step-000001", "step-000002"}
        moment += 1
    assert found == sorted(found)
    assert found.count(1) > 10  # before the rename
    assert found.count(2) > 5  # after it, while the old one is deleted


def test_what_was_renamed_is_the_users(tmp_path: Path) -> None:
    write(tmp_path, 1)
    renamed = tmp_path / "checkpoints" / "step-best"
    (tmp_path / "checkpoints" / "step-000001").rename(renamed)
    write(tmp_path, 2, keep=1)
    write(tmp_path, 3, keep=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-best", "step-000003"}


def test_moments_of_another_kind_name_the_option(tmp_path: Path) -> None:
    model, optimizer = make(1.0)
    with CheckpointWriter(tmp_path, WORLD, None) as to:
        to.save(model, LORA, optimizer, Progress(step=1, settings={"moments": "fp32"}), base_model="base")
    with pytest.raises(ValueError, match=r"moments = 'fp32', this run has '8 bits'.*fp32: --optim adamw; 8 bits"):
        refuse_other({"moments": "8 bits"}, read_progress(checkpoints(tmp_path)[0]).settings, tmp_path)


def test_an_old_one_that_cannot_be_deleted_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background_writer, "drop_old_checkpoints", failing)
    write(tmp_path, 1)
    assert_holds(checkpoints(tmp_path)[0], 1)
    assert "an old checkpoint was not deleted: [Errno 5]" in capsys.readouterr().err


def test_any_error_of_the_thread_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("qsharded.checkpoint.training_state.write_tensors", broken)
    with pytest.raises(CheckpointNotWritten, match="step-000001 was not written: broken"):
        write(tmp_path, 1)


def test_the_adapter_inside_names_the_revision(tmp_path: Path) -> None:
    model, optimizer = make(1.0)
    with CheckpointWriter(tmp_path, WORLD, None) as to:
        to.save(model, LORA, optimizer, Progress(step=1), base_model="base", revision="v2")
    described = read_json(checkpoints(tmp_path)[0] / "adapter" / "adapter_config.json")
    assert (described["base_model_name_or_path"], described["revision"]) == ("base", "v2")


def test_files_beside_the_adapter_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make(1.0)
    with CheckpointWriter(tmp_path, WORLD, None) as to:
        to.save(model, LORA, optimizer, Progress(step=1), base_model="base", beside_adapter={"note.txt": b"said"})
    checkpoint = checkpoints(tmp_path)[0]
    assert (checkpoint / "adapter" / "note.txt").read_bytes() == b"said"
    assert "adapter/note.txt" in read_manifest(checkpoint).files
