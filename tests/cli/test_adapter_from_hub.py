"""``--adapter owner/name``: through a Hub that is not there."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from qsharded import generate, merge, train
from qsharded.cli.base_model import find_adapter
from tests.adapters import write_adapter
from tests.checkpoints import write_chat_checkpoint, write_chat_rows

REPOSITORY = "owner/adapter"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_chat_checkpoint(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter, which the Hub has too beside other files."""
    adapter = write_adapter(tmp_path / "stored", model, layers_to_transform=[1])
    for name in ("README.md", "optimizer.pt", "tokenizer.model", "training_args.bin"):
        (adapter / name).write_text("x")
    cache = tmp_path / "cache"
    asked: list[str] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str], **others: Any) -> str:
        asked.append(repo)
        if repo != REPOSITORY:
            raise OSError("404")
        cache.mkdir(exist_ok=True)
        names = [path.name for path in adapter.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            if not (cache / name).exists():
                (cache / name).symlink_to(adapter / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return adapter


def test_what_belongs_to_an_adapter_is_downloaded_and_no_more(adapter: Path) -> None:
    found = find_adapter(REPOSITORY)
    assert sorted(path.name for path in found.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.model"
    ]  # fmt: skip


def test_what_the_hub_refuses_is_named(adapter: Path) -> None:
    with pytest.raises(ValueError, match="owner/other is no local folder, and the Hub did not give it: 404"):
        find_adapter("owner/other")


@pytest.mark.parametrize("path", ["nowhere", "./owner/adapter", "/owner/adapter", "a/b/c"])
def test_a_path_is_not_looked_for_on_the_hub(adapter: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"is no adapter folder, it has no adapter_config\.json"):
        find_adapter(path)


def test_a_local_folder_is_taken_before_the_hub(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    adapter.rename("owner/adapter")
    assert find_adapter(REPOSITORY) == Path(REPOSITORY)


def test_the_commands_take_it_as_they_take_the_folder(
    tmp_path: Path, model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for name in (str(adapter), REPOSITORY):
        generate.main(["--adapter", name, "--prompt", "a", "--max-new-tokens", "4"])  # the base is the one it names
        said.append(capsys.readouterr().out)
        merge.main(["--adapter", name, "--output", str(tmp_path / f"merged-{len(said)}")])
    assert said[0] == said[1]
    merged = [load_file(tmp_path / f"merged-{number}" / "model.safetensors") for number in (1, 2)]
    assert all((merged[0][key] == merged[1][key]).all() for key in merged[0])
    rows = write_chat_rows(tmp_path / "rows.jsonl", 4)
    flags = ["--model", str(model), "--dataset", str(rows), "--output-dir", str(tmp_path / "out"), "--save-steps", "0"]
    train.main([*flags, "--adapter", REPOSITORY, "--max-steps", "1", "--learning-rate", "1e-9"])
    written, began = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out/adapter", adapter))
    assert written.keys() == began.keys(), "the layers that it adapts, and no others"
    assert all(".layers.1." in name for name in written)
