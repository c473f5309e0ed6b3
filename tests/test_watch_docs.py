"""The commands of docs/watch.md, in their order, in one empty folder, cut short."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import qsharded
from qsharded import compare, train

PAGE = Path(qsharded.__file__).parent.parent / "docs" / "watch.md"
SHORT = ["--max-steps", "2", "--exact-match-dataset", ""]


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []
    for line in commands():
        if not line.startswith("qsharded "):
            prepared = line.replace("$(python ", f"$({shlex.quote(sys.executable)} ")
            subprocess.run(["bash", "-c", prepared], check=True)
            continue
        name, *words = shlex.split(line)[1:]
        {"train": lambda given: train.main([*given, *SHORT]), "compare": compare.main}[name](words)
        ran.append(name)
    assert ran == ["train", "train", "compare"]
    said = capsys.readouterr().out
    assert "lora-r" in said.rpartition("settings that differ")[2]
    assert "best eval_all_loss" in said
    assert json.loads(Path("output/rank-4/best/best.json").read_text())["step"] == 2
    for file in ("output/rank-16/report.html", "output/rank-16/samples.jsonl", "compared.html", "compared.svg"):
        assert Path(file).is_file(), file
    assert list(Path("output/rank-16/tensorboard").iterdir())
