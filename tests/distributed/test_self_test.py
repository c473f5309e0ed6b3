"""The start-up probe stops a run whose gather damages bytes, and no other."""

import contextlib
import io
from collections.abc import Callable

import pytest
import torch

from qsharded import generate, train
from qsharded.distributed import fsdp, self_test
from qsharded.distributed.exact_all_gather import DamagedGather
from qsharded.distributed.self_test import check_gather
from qsharded.distributed.world import start_world
from tests.distributed.harness import run_ranks


def use_plain_gather() -> None:
    """FSDP2's own gather."""
    fsdp.use_exact_gather = lambda model: None


def what_the_probe_says() -> str:
    try:
        check_gather(start_world())
    except DamagedGather as error:
        return str(error)
    return ""


def probe_plain() -> str:
    use_plain_gather()
    return what_the_probe_says()


def probe_damaged_on_the_last_rank_alone() -> str:
    bytes_of_last = 3 if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1 else 0
    self_test.changed_bytes = lambda *mode: bytes_of_last
    return what_the_probe_says()


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_exact_gather_passes(world_size: int) -> None:
    assert run_ranks(what_the_probe_says, world_size) == [""] * world_size


def test_a_plain_gather_is_found_with_all_its_damage() -> None:
    # what the copy does to all patterns, under both policies, on both ranks
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    cuda = patterns.float().bfloat16().view(torch.uint8)
    changed = int((cuda != patterns.view(torch.uint8)).sum())
    for message in run_ranks(probe_plain, 2):
        assert f"PyTorch {torch.__version__} changed {changed * 2 * 2} bytes" in message
        assert "Use a PyTorch version that qsharded supports" in message


def test_damage_on_one_rank_stops_all() -> None:
    assert all("changed 6 bytes" in message for message in run_ranks(probe_damaged_on_the_last_rank_alone, 2))


def stopped(main: Callable[..., None], arguments: list[str]) -> str:
    """What a command prints on a machine whose gather does damage, before it reads anything."""
    use_plain_gather()
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(SystemExit):
        main(arguments)
    return stderr.getvalue()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(train.main, ["--model", "x/y", "--dataset", "rows.jsonl"]), (generate.main, ["--model", "x/y", "--prompt", "a"])],
)
def test_commands_stop_in_one_line(main: Callable[..., None], arguments: list[str]) -> None:
    for said in run_ranks(stopped, 2, main, arguments):
        assert said.startswith(f"{main.__module__}: error")
        assert "packed weights would be damaged" in said
        assert said.count("\n") == 1
