"""The loader: an absent library is said once, a broken one is not hidden."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsharded_kernels import library


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "libqsharded.so"
    monkeypatch.setattr(library, "PATH", path)
    library.load.cache_clear()
    yield path
    library.load.cache_clear()


def test_absent_is_none_and_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert library.load() is None
        assert library.load() is None
    assert [(record.levelname, str(path) in record.message) for record in caplog.records] == [("INFO", True)]


def test_broken_library_gives_the_loaders_error(path: Path) -> None:
    path.write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"libqsharded\.so: .*(ELF|file too short)"):
        library.load()
