"""No room on a GPU or the host: one message that helps, and an exit status of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import train
from qsharded.config import parse_train
from qsharded.distributed.fsdp import layers_of
from qsharded.distributed.world import World
from qsharded.plan.parameters import CODES, tensors_by_class
from qsharded.training import memory_errors, objective
from qsharded.training.memory_errors import _explanation, _measured
from qsharded.utils import hardware
from qsharded.utils.exit_codes import OUT_OF_MEMORY
from qsharded.utils.sharding import local
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks
from tests.distributed.test_self_check import built, world_of_ranks
from tests.distributed.test_train import arguments

GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 3.00 GiB free. If reserved but unallocated memory is\n"
)
OPTIONS: dict[str, Any] = {"max_steps": 3, "eval_split": 0, "activation_checkpointing": "none"}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the loss of the second step's first micro-batch raise an error."""

    def fail(error: BaseException) -> None:
        loss, calls = objective.batch_loss, []

        def counted(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise error
            return loss(*args)

        monkeypatch.setattr(objective, "batch_loss", counted)

    return fail


def end(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as left:
        train.main(arguments)
    return left.value.code, capsys.readouterr().err


def test_a_gpu_without_room_names_phase_plan_and_what_fits(
    model: Path, dataset: Path, tmp_path: Path, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(GPU)
    status, said = end(arguments(model, dataset, tmp_path / "out", **OPTIONS), capsys)
    lines = said.splitlines()
    first = "out of GPU memory in step 2: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 3.00 GiB free."
    assert status == OUT_OF_MEMORY
    assert lines[0] == f"qsharded.train: error (rank 0): {first}"
    adapters = next(line.split() for line in lines if line.split()[:1] == ["adapters"])
    assert adapters[1] == adapters[2]  # planned and measured
    assert any(line.startswith("  allocated at the peak") for line in lines)
    assert any("--activation-checkpointing selective: needs" in line for line in lines)


def test_settings_that_were_chosen_for_a_large_gpu_are_planned_as_chosen(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several ranks with room layers stay gathered: what is suggested must undo that where it has to."""
    monkeypatch.setattr(hardware, "gpu_memory", lambda: 100 * hardware.GIB)
    words = arguments(model, dataset, tmp_path / "out", **OPTIONS)
    config, world = parse_train(words), World(0, 2, torch.device("cpu"), None)
    said = _explanation(config, world, None, GPU)
    assert any(line.startswith("  --reshard-after-forward always: needs ") for line in said.splitlines())
    assert "--cpu-offload --activation-checkpointing full --reshard-after-forward always: needs " in said


def test_a_plan_that_cannot_be_made_is_told(
    model: Path, dataset: Path, tmp_path: Path, failing: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def no_plan(*_: Any) -> Any:
        raise ValueError("its code asks for values")

    monkeypatch.setattr(memory_errors, "planner_of", no_plan)
    failing(GPU)
    status, said = end(arguments(model, dataset, tmp_path / "out", **OPTIONS), capsys)
    assert status == OUT_OF_MEMORY
    assert said.splitlines()[-1] == "  its memory could not be planned: its code asks for values"


def test_a_host_without_room_names_what_was_planned(
    model: Path, dataset: Path, tmp_path: Path, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    status, said = end(arguments(model, dataset, tmp_path / "out", **OPTIONS), capsys)
    assert status == OUT_OF_MEMORY
    assert "out of host memory in step 2: [enforce fail] DefaultCPUAllocator" in said
    assert "planned for a rank, GiB: interpreter 2.5, reading the checkpoint 2.0" in said


def test_another_error_stays_what_it_is(model: Path, dataset: Path, tmp_path: Path, failing: Any) -> None:
    failing(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train.main(arguments(model, dataset, tmp_path / "out", **OPTIONS))


def fail_on_every_rank(words: list[str]) -> tuple[int, str]:
    from contextlib import redirect_stderr
    from io import StringIO

    def no_room(*args: Any) -> Any:
        raise GPU

    objective.batch_loss = no_room
    with redirect_stderr(StringIO()) as said:
        try:
            train.main(words)
        except SystemExit as left:
            return left.code, said.getvalue()
    return 0, ""


def test_of_ranks_that_have_no_room_one_tells_it(model: Path, dataset: Path, tmp_path: Path) -> None:
    ends = run_ranks(fail_on_every_rank, 2, arguments(model, dataset, tmp_path / "out", **OPTIONS))
    told = [(status, said) for status, said in ends if said]
    assert len(told) == 1
    assert {status for status, _ in ends} == {OUT_OF_MEMORY}  # which a launcher passes on, whoever leaves first


def measured_before_and_in_a_layer(folder: Path) -> tuple[dict[str, int], dict[str, int], int]:
    world = world_of_ranks()
    model, _ = built(world, folder, {})
    codes = sum(local(tensor).nbytes for kind, tensor in tensors_by_class(model) if kind == CODES)
    before = dict(_measured(model, world))
    next(iter(layers_of(model))).unshard()  # type: ignore[operator]  # it is FSDP2's
    return before, dict(_measured(model, world)), codes


def test_what_a_layer_gathers_is_not_counted_as_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for before, in_a_layer, codes in run_ranks(measured_before_and_in_a_layer, 2, tmp_path):
        assert before == in_a_layer
        assert before[CODES] == codes > 0
