"""The commands of docs/share.md and docs/serve.md, in their order, in one empty folder, the run cut short."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import qsharded
from qsharded import merge, train
from tests.hub import serving
from tests.training.short_runs import rows

DOCS = Path(qsharded.__file__).parent.parent / "docs"
FEW = ["--dataset", str(rows("train.jsonl", 200)), "--eval-dataset", str(rows("eval.jsonl", 8))]
SHORT = {"train": ["--max-steps", "2", "--exact-match-dataset", "", *FEW], "merge": ["--check-rows", "1"]}


def run_commands(page: str) -> list[str]:
    """Returns the names of those that ran."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    for _, name, *words in lines:
        {"train": train, "merge": merge}[name].main([*words, *SHORT[name]])
    return [name for _, name, *_ in lines]


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gguf", "compressed_tensors"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch) as hub:
        assert run_commands("share.md") == ["train", "merge"]
    for name, file in (("tuned", "adapter_model.safetensors"), ("tuned-merged", "model.safetensors")):
        files = hub.repositories[f"me/{name}"]["files"]
        assert file in files
        assert f"me/{name}" in files["README.md"].decode()
    shutil.rmtree("merged")  # the other page writes one too
    assert run_commands("serve.md") == ["merge"] * 5
    for name in ("merged-gguf", "merged-q8", "merged-q4"):
        assert Path(name, "model.gguf").is_file()
    assert Path("merged-w4a16", "config.json").is_file()
