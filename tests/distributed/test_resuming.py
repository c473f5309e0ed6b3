"""Ranks agree on what they resume: the batch is kept, and what differs is refused by all in the same words."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qsharded import generate, train
from qsharded.checkpoint.resume import read_progress
from tests.checkpoints import write_chat_checkpoint, write_chat_rows
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import arguments, losses

# a constant rate: runs of two, three and four steps go on from each other
OPTIONS = {"max_steps": 2, "save_steps": 2, "eval_split": 0, "lora_dropout": 0, "optim": "adamw"}
OPTIONS |= {"lr_scheduler_type": "constant", "warmup_steps": 0}


def printed(command: Any, args: list[str]) -> tuple[str, str]:
    """What a command prints on this rank."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.suppress(SystemExit),
    ):
        command(args)
    return out.getvalue(), err.getvalue().replace(" (rank 1)", "")


def resume_all(folder: Path) -> dict[str, str]:
    """One spawn, several runs: what this rank is told by each, by name."""
    again = OPTIONS | {"max_steps": 4, "resume_from_checkpoint": "auto"}
    rank = dist.get_rank()
    train.stop_world = generate.stop_world = lambda world: None  # the next run needs it

    def resume(model: str, dataset: str, out: str = "out", **options: Any) -> str:
        return printed(train.main, arguments(folder / model, folder / dataset, folder / out, **again | options))[1]

    told = {
        "rows": resume("model", "fewer.jsonl"),
        "base": resume("other", "rows.jsonl"),
        "seed": resume("model", "rows.jsonl", seed=1),
        "cut": resume("cut", "rows.jsonl"),
        "per rank": resume("model", ("rows.jsonl", "fewer.jsonl")[rank]),
    }
    adapter = ["--adapter", str(folder / "out" / "checkpoints" / "step-000002" / "adapter")]
    told["adapter"] = printed(generate.main, ["--model", str(folder / "other"), *adapter, "--prompt", "a"])[1]
    told["taken"] = printed(
        train.main, arguments(folder / "model", folder / "rows.jsonl", folder / "out", **again | {"max_steps": 3})
    )[0]
    told["again"] = resume("model", "rows.jsonl", save_steps=1)
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, other/, cut/, two datasets, and out/ of a run of one rank."""
    folder = tmp_path_factory.mktemp("folder")
    for name, seed in (("model", 0), ("other", 1)):
        (folder / name).mkdir()
        write_chat_checkpoint(folder / name, seed=seed)
    shutil.copytree(folder / "model", folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_chat_rows(folder / "rows.jsonl", 22)
    write_chat_rows(folder / "fewer.jsonl", 21)
    train.main(arguments(folder / "model", folder / "rows.jsonl", folder / "out", **OPTIONS))
    return folder


def test_ranks_refuse_in_the_same_words_and_keep_the_batch_of_other_ranks(folder: Path) -> None:
    whole = shutil.copytree(folder / "out", folder / "alone")
    main, other = run_ranks(resume_all, 2, folder)
    for name, complaint in {
        "rows": "21 rows, there were 22; those in both are the same",
        "base": "trained on another base model",
        "seed": "seed = 42, this run has 1",
        "cut": "model.safetensors is damaged or incomplete",
        "per rank": "rank 1 has read other training rows than rank 0",
        "adapter": "was trained on another base model",
    }.items():
        assert complaint in main[name]
        assert other[name] == ""  # it found the same, and leaves the telling to the main rank
        assert main[name].count("\n") == 1
    line = "gradient accumulation: 1 in place of 2, so that a step keeps its 4 rows on 2 ranks\n"
    assert main["taken"].count(line) == 1
    assert main["again"] == other["again"] == ""  # the same command, on the ranks that wrote the checkpoint
    state = read_progress(folder / "out" / "checkpoints" / "step-000004")
    assert (state.settings["rows_per_step"], state.settings["gradient_accumulation_steps"]) == (4, 2)
    resumed = OPTIONS | {"max_steps": 4, "resume_from_checkpoint": "auto"}
    train.main(arguments(folder / "model", folder / "rows.jsonl", whole, **resumed))
    # the same rows in each step; sums over ranks are in another order
    assert losses(folder / "out")[2:] == pytest.approx(losses(whole)[2:], rel=1e-5)
