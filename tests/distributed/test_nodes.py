"""Several nodes: who prepares what, and torchrun's rendezvous of two agents on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qsharded import generate, train
from qsharded.distributed.world import start_world
from qsharded.report.run_files import read_metrics
from tests.distributed.harness import free_port, run_ranks

BUILTIN = Path(train.__file__).parent / "builtin"


def prepare(folder: Path) -> str:
    """What a download does: the first of a node brings the file, the others find it."""
    world = start_world()
    file = folder / f"node{world.rank // 2}"

    def download() -> str:
        if world.local_rank == 0:
            time.sleep(0.3)  # long enough for the others to come too early
            file.write_text("downloaded")
        return file.read_text()

    return world.first_on_node(download)


def two_a_node(folder: Path) -> str:
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    return prepare(folder)


def test_the_first_rank_of_each_node_prepares(tmp_path: Path) -> None:
    assert run_ranks(two_a_node, 3, tmp_path) == ["downloaded"] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"node0", "node1"}


def fail_to_prepare() -> str:
    def refuse() -> None:
        raise ValueError(f"the Hub refused rank {world.rank}")

    world = start_world()
    with pytest.raises(ValueError, match="the Hub refused") as caught:
        world.first_on_node(refuse)
    return str(caught.value)


def test_a_failure_to_prepare_holds_no_rank() -> None:
    assert run_ranks(fail_to_prepare, 2) == ["the Hub refused rank 0", "the Hub refused rank 1"]


def options(output: Path) -> list[str]:
    return [
        f"--model={BUILTIN / 'model'}",
        f"--dataset={BUILTIN / 'train.jsonl'}",
        f"--output-dir={output}",
        "--max-steps=2",
        "--save-steps=2",
        "--logging-steps=1",
        "--learning-rate=0.01",
        "--warmup-ratio=0",
    ]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


def test_two_agents_train_as_two_ranks_of_one_node_do(tmp_path: Path) -> None:
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=1", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [*launcher, "-m", "qsharded.train", *options(tmp_path / "two-nodes")]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    printed = [agent.communicate(timeout=240)[0].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)
    run_ranks(train.main, 2, options(tmp_path / "one-node"))
    assert losses(tmp_path / "two-nodes") == losses(tmp_path / "one-node")
    assert len(losses(tmp_path / "two-nodes")) == 2
    assert (tmp_path / "two-nodes" / "checkpoints" / "step-000002" / "manifest.json").is_file()


@pytest.mark.parametrize("main", [train.main, generate.main])
@pytest.mark.parametrize(
    ("local_rank", "failure", "complaint"),
    [
        (2, None, "local rank 2 has no GPU of its own: this machine has 2; give torchrun --nproc-per-node 2"),
        (1, torch.distributed.DistNetworkError("no route\nframe #0: c10"), "cannot join the other ranks: no route; "),
        (1, ValueError("MASTER_ADDR expected"), "MASTER_ADDR expected"),
    ],
)
def test_a_rank_that_cannot_join_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], None],
    local_rank: int,
    failure: Exception | None,
    complaint: str,
) -> None:
    """As on a machine of two GPUs, where the third rank finds none."""
    for name, value in {"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr("qsharded.distributed.world.let_reserved_memory_grow", lambda: None)

    def fail(*_: object, **__: object) -> None:
        raise failure or AssertionError("a rank without a GPU must not wait for others")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(SystemExit) as leave:
        main(["--model", "x/y", *(["--dataset", "x"] if main is train.main else ["--prompt", "x"])])
    said = capsys.readouterr().err
    assert leave.value.code == 1
    assert said.startswith(f"{main.__module__}: error (rank 3): {complaint}")
    assert said.count("\n") == 1
