"""Files that are whole or what they were before, on a disk that fails: limits and errors of the system's own."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import merge, quantize, train
from qsharded.checkpoint.adapter import save_adapter
from qsharded.checkpoint.safetensors_writer import SafetensorsFile
from qsharded.data import Tokenizer
from qsharded.nn import LoRAConfig
from qsharded.report.run_files import read_metrics
from qsharded.training.metrics import MetricsLog, TrainRow
from qsharded.utils.durable_files import (
    AppendedFile,
    NotWritten,
    Replacement,
    copy_whole,
    free_bytes,
    write_whole,
    written_elsewhere,
)
from tests.checkpoint.test_background_writer import Tiny
from tests.checkpoints import write_chat_checkpoint


@contextmanager
def room_in_a_file(nbytes: int) -> Iterator[None]:
    """The system lets no file grow beyond so many bytes: its EFBIG comes where a full disk's ENOSPC would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def safetensors_file(path: Path) -> None:
    with SafetensorsFile(path, {"weight": (torch.float32, (1000,))}) as file:
        file.write("weight", torch.zeros(1000))


def by_a_library(path: Path) -> None:
    with written_elsewhere(path) as beside:
        beside.write_bytes(bytes(4000))


def tokenizer_copy(path: Path) -> None:
    source = path.with_name("source")
    source.write_bytes(bytes(4000))
    with room_in_a_file(1000):
        copy_whole(source, path)


@pytest.mark.parametrize("write", [safetensors_file, by_a_library, lambda path: write_whole(path, bytes(4000))])
def test_a_full_disk_is_told_by_path_and_bytes_and_costs_no_old_file(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(NotWritten) as caught, room_in_a_file(1000):
        write(path)
    message = str(caught.value)
    assert message.startswith(f"{path} was not written: File too large")
    assert " bytes, " in message or write is by_a_library
    assert message.endswith(" are free there")
    assert caught.value.errno == errno.EFBIG
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    write(path)
    assert path.stat().st_size >= 4000
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_that_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(NotWritten, match=r"file was not written: File too large; it takes 4,000 bytes, [\d,]+ are"):
        tokenizer_copy(path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_bytes_that_do_not_reach_the_disk_replace_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def failing(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(NotWritten, match="file was not written: Input/output error"):
        write_whole(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])


def test_the_new_name_comes_after_the_bytes_and_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a power cut tests: the file's bytes, the rename, the folder's names."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "bytes")
        fsync(handle)

    def noted_replace(*args: Any) -> None:
        order.append("rename")
        replace(*args)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with Replacement(tmp_path / "file") as file:
        file.write(b"new")
    assert order == ["bytes", "rename", "folder"]


def test_an_adapter_that_does_not_fit_is_no_error_of_safetensors(tmp_path: Path) -> None:
    model, lora = Tiny(), LoRAConfig(r=2, target_modules=["layer"])
    save_adapter(model, lora, tmp_path, base_model="base")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.layer.weight.data.add_(1)
    with pytest.raises(NotWritten, match=r"adapter_model.safetensors was not written: .*; it takes \d+ bytes"):  # noqa: SIM117
        with room_in_a_file(100):
            save_adapter(model, lora, tmp_path, base_model="base")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    train.main(f"--model {model} --dataset {rows} --output-dir {folder}/out --max-steps 1 --save-steps 0".split())
    return folder / "out" / "adapter"


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_each_command_names_the_file_that_does_not_fit_and_leaves_nothing(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    output = tmp_path / "out"
    commands: dict[str, Callable[[], None]] = {
        "quantize": lambda: quantize.main(f"--model {model} --output {output}".split()),
        "merge": lambda: merge.main(f"--model {model} --adapter {adapter} --output {output}".split()),
    }
    with pytest.raises(SystemExit), room_in_a_file(20_000):
        commands[command]()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"qsharded.{command}: error: ")
    assert "model.safetensors was not written: File too large; it takes " in said
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizers_files_are_copied_whole(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotWritten, match="was not written"), room_in_a_file(10):
        Tokenizer.from_folder(model).copy_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def row(step: int) -> TrainRow:
    return TrainRow(step, 0.0, 1.0, 1.0, 1e-3, 1.0, 1.0, 0)


def test_metrics_that_do_not_fit_end_no_training_and_follow_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 4, is_main=True) as log:
        log.train(row(1))
        with room_in_a_file((tmp_path / "metrics.jsonl").stat().st_size + 10):
            log.train(row(2))
            log.train(row(3))
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        log.train(row(4))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("warning: ") == 1


def test_a_piece_that_fits_in_part_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old\n")
    file = AppendedFile(path)
    with pytest.raises(NotWritten, match="file was not written"), room_in_a_file(6):
        file.add(b"more\n")
    assert path.read_bytes() == b"old\n"
    file.add(b"last\n")
    assert path.read_bytes() == b"old\nmore\nlast\n"
    file.close()


def test_room_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return type("Usage", (), {"total": 0 if len(asked) > 1 else 10, "free": 7})

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert free_bytes(tmp_path / "not" / "there") == 7
    assert free_bytes(tmp_path) is None  # a file system that knows no total knows nothing
    assert asked == [tmp_path, tmp_path]
