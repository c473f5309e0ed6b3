"""A disk that is full when the run is done: the checkpoint holds the training, the message is the same on all ranks."""

import contextlib
import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qsharded import train
from qsharded.checkpoint.intact import read_sound
from qsharded.training import results
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import arguments
from tests.utils.test_durable_files import room_in_a_file


def run_full_at_the_adapter(model: Path, dataset: Path, out: Path, **options: Any) -> str:
    """Train on a disk that takes no more than 2000 bytes in a file once the adapter's turn has come."""
    save_adapter = results.save_adapter

    def limited(*args: Any, **kwargs: Any) -> None:
        with room_in_a_file(2000):
            save_adapter(*args, **kwargs)

    results.save_adapter = limited
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as stopped:
            train.main(arguments(model, dataset, out, max_steps=3, **options))
    finally:
        results.save_adapter = save_adapter
    assert stopped.value.code == 1
    return printed.getvalue()


def full_on_each_rank(model: Path, dataset: Path, out: Path) -> str:
    return run_full_at_the_adapter(model, dataset, out, save_steps=500)


def test_a_full_disk_at_the_adapter_costs_no_training_on_any_rank(model: Path, dataset: Path, tmp_path: Path) -> None:
    """The issue's: a traceback of safetensors, and the run was gone. Its last checkpoint is there although no step was
    due for one, and the command in the message writes the adapter that a run on a larger disk writes."""
    out = tmp_path / "out"
    said = [
        message.removeprefix("qsharded.train: error")
        for message in run_ranks(full_on_each_rank, 2, model, dataset, out)
    ]
    assert said[0].removeprefix(": ") == said[1].removeprefix(" (rank 1): ")
    assert all(message.count("\n") == 1 for message in said)
    weights = out / "adapter" / "adapter_model.safetensors"
    assert f"{weights} was not written: File too large; it takes " in said[0]
    assert " are free there" in said[0]
    checkpoint = out / "checkpoints" / "step-000003"
    assert f"Checkpoint {checkpoint} holds all of the training" in said[0]
    assert read_sound(checkpoint).step == 3
    assert not (out / "adapter").exists()
    assert not (out / "finished.json").exists()
    command = shlex.split(said[0][said[0].index("torchrun") :])
    assert command[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]
    run_ranks(train.main, 2, command[6:])
    assert (out / "finished.json").is_file()
    found, kept = load_file(weights), load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    assert found.keys() == kept.keys()
    assert all((found[name] == kept[name]).all() for name in found)


def test_without_checkpoints_the_message_says_that_none_holds_the_training(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    said = run_full_at_the_adapter(model, dataset, tmp_path / "out", save_steps=0)
    assert said.endswith("No checkpoint holds the last step either (--save-steps 0)\n")
    assert said.count("\n") == 1


def test_the_last_step_has_a_checkpoint_and_the_limit_holds_at_the_end(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    train.main(arguments(model, dataset, tmp_path, max_steps=3, save_steps=2, save_total_limit=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
