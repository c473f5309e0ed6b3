"""Session set-up that must come before torch, triton and huggingface_hub are imported."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Two cores serve the whole suite, and its multi-rank tests start processes of their own that inherit this.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test may reach the network: one that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so it is set before any module that defines one is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.checkpoints import write_chat_checkpoint, write_chat_rows
from tests.slow_variants import SLOW_VARIANTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords or item.nodeid in SLOW_VARIANTS:
                item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _signals_reach_the_next_test() -> Iterator[None]:
    """What runs in this process may block none: processes that later tests start would inherit it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    assert signal.pthread_sigmask(signal.SIG_SETMASK, before) == before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model so small that a run takes seconds, one for each module that asks."""
    return write_chat_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations for it."""
    return write_chat_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 22)
