"""``merge --push-to-hub``: asked before weights are merged, uploaded when all is written."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import qsharded
from qsharded import merge
from tests.adapters import write_adapter
from tests.hub import FakeHub, serving

BUILTIN = Path(qsharded.__file__).parent / "builtin" / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(monkeypatch) as hub:
        yield hub


def words(tmp_path: Path, name: str) -> list[str]:
    adapter = write_adapter(tmp_path / "adapter", BUILTIN)
    output = str(tmp_path / "merged")
    return ["--adapter", str(adapter), "--model", str(BUILTIN), "--output", output, "--push-to-hub", name]


def test_the_merged_model_goes_there_with_its_card(
    tmp_path: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        merge.main([*words(tmp_path, "me/merged"), "--no-hub-private"])
    assert f"merged model uploaded to {hub.url}/me/merged" in caplog.text
    repository = hub.repositories["me/merged"]
    assert not repository["private"]
    assert repository["files"] == {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    text = repository["files"]["README.md"].decode()
    assert "vllm serve me/merged" in text
    assert "mean KL divergence" in text
    assert str(tmp_path) not in text
    assert str(BUILTIN) not in text
    assert ModelCard(text).data.library_name == "transformers"


def test_what_the_hub_will_not_take_is_told_first(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        merge.main(words(tmp_path, "other/merged"))
    assert "qsharded.merge: error: --push-to-hub other/merged: the Hub does not take it" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_upload_that_fails_leaves_the_merged_model(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fails.add("/commit/")
    merge.main(words(tmp_path, "merged"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    told = capsys.readouterr().err
    assert f"Upload it with: hf upload me/merged {tmp_path}/merged ." in told
