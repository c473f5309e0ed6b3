"""A conversation with a sharded model is the one with a whole model: one rank reads the keyboard, all answer."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from qsharded import chat
from tests.checkpoints import write_checkpoint
from tests.data.folders import make_folder
from tests.data.templates import CHATML
from tests.distributed.harness import run_ranks

LINES = "What is 2+2?\n/system Be brief.\n世界\nAnd now?\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose 3 x 64 columns divide unevenly."""
    folder = make_folder(tmp_path_factory.mktemp("llama"), template=CHATML)
    return write_checkpoint(folder, hidden_size=192, intermediate_size=320, vocab_size=449, shards=2)


def printed(folder: Path) -> str:
    """What this rank prints; a rank that reads another keyboard than the main one's would get nothing from it."""
    import torch.distributed as dist

    sys.stdin = io.StringIO(LINES if dist.get_rank() == 0 else "")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        chat.main(["--model", str(folder), "--max-new-tokens", "8", "--dtype", "float32"])
    return out.getvalue()


def test_ranks_say_what_one_says_and_the_first_prints(folder: Path) -> None:
    [alone] = run_ranks(printed, 1, folder)
    assert alone.count("\n") > 4
    assert run_ranks(printed, 2, folder) == [alone, ""]
