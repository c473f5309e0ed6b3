"""Rows that ranks have apart, in unequal numbers, come together to the last bit."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.utils.sharding import gathered_rows, rows_of_rank
from tests.distributed.harness import run_ranks


def every_pattern(rows: int) -> Tensor:
    """bf16 [rows, 64], NaN patterns among them."""
    words = torch.arange(rows * 64, dtype=torch.int32) * 97 % 65536
    return words.to(torch.uint16).view(torch.bfloat16).view(rows, 64)


def gathered(total: int) -> bool:
    whole = every_pattern(total)
    start, stop = rows_of_rank(total, dist.get_world_size(), dist.get_rank())
    found = gathered_rows(whole[start:stop], total, dist.group.WORLD)
    return torch.equal(found.view(torch.int16), whole.view(torch.int16))


@pytest.mark.parametrize("total", [700, 2])
def test_each_rank_gets_all_rows(total: int) -> None:
    """Of 700 rows three ranks have 234, 234 and 232; of 2 the last one has none."""
    assert all(run_ranks(gathered, 3, total))
