"""The compiled library as csrc/ is now, built by setup.py, so that no test meets a stale one.

Where one has just been built, QSHARDED_TEST_LIBRARY names it: nvcc takes a minute.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qsharded_kernels import library

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def built_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("QSHARDED_TEST_LIBRARY"):
        return Path(given).resolve(strict=True)
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}"]
    # without a GPU nothing runs what nvcc makes
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "QSHARDED_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return folder / "qsharded_kernels" / "libqsharded.so"


@pytest.fixture(scope="module")
def fresh_library(built_library: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "PATH", built_library)
        library.load.cache_clear()
        yield built_library
    library.load.cache_clear()


@pytest.fixture(scope="module")
def needs_cuda_part(fresh_library: Path) -> None:
    compiled = library.load()
    assert compiled is not None
    if not library.has_cuda(compiled):
        pytest.skip("needs nvcc")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """In this mode PyTorch fills new memory with NaN or the largest integer: outputs, workspace and partial sums."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
