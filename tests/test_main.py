"""``qsharded NAME``: which command runs with which words, and what is said where there is none."""

import importlib.util
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qsharded
from qsharded import __main__ as front
from qsharded.cli import launch
from qsharded.utils import signals

ROOT = Path(__file__).parent.parent


def test_the_console_script_is_this_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"qsharded": f"{front.main.__module__}:main"}


def test_every_command_is_a_module_and_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        front.main(["--help"])
    assert leave.value.code == 0
    listed = capsys.readouterr().out
    for name, one in front.SUBCOMMANDS.items():
        assert importlib.util.find_spec(one.module), name
        assert f"\n  {name} " in listed


@pytest.mark.parametrize("name", front.SUBCOMMANDS)
def test_every_command_runs_as_a_module_of_its_name(name: str) -> None:
    spec = importlib.util.find_spec(f"qsharded.{name}")
    assert spec is not None
    assert spec.submodule_search_locations is None or importlib.util.find_spec(f"qsharded.{name}.__main__")


def test_the_module_called_plan_plans(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--gpu", "L4"])
    monkeypatch.setattr(signals, "take_over", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("qsharded.plan", run_name="__main__")
    assert leave.value.code == 0
    assert capsys.readouterr().out.startswith("verdict: fits")


def test_every_command_of_the_layers_table_has_a_name() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [line] = [line for line in table.splitlines() if "commands, each `qsharded NAME`" in line]
    names = line.partition("  ")[0].split()
    assert {f"qsharded.{name}" for name in names} == {one.module for one in front.SUBCOMMANDS.values()}


def test_no_command_is_a_mistake_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        front.main([])
    assert leave.value.code == 2
    assert capsys.readouterr().err == front.help_text()


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        front.main(["trian", "--model", "m"])
    assert leave.value.code == 2
    assert capsys.readouterr().err == "qsharded: error: there is no command 'trian'; did you mean 'train'?\n"


def test_a_command_gets_its_words_and_plan_is_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(front, "run_module", lambda module, argv: ran.append((module, list(argv))))
    monkeypatch.setattr(launch, "train", lambda argv: ran.append(("launch", list(argv))))
    front.main(["merge", "--adapter", "a"])
    front.main(["plan", "--gpus", "2"])
    front.main(["train", "--lora-r", "4"])
    assert ran == [
        ("qsharded.merge", ["--adapter", "a"]),
        ("qsharded.train", ["--dry-run", "--gpus", "2"]),
        ("launch", ["--lora-r", "4"]),
    ]


def test_as_a_process_it_tells_its_version_and_loads_no_torch() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "qsharded", "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"qsharded {qsharded.__version__}\n"
    assert " torch" not in done.stderr


@pytest.mark.parametrize("words", ["train --help", "compare {run} {run}"])
def test_a_reader_that_leaves_is_no_error(words: str, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "config.toml"):
        (tmp_path / name).touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    command = [sys.executable, "-m", "qsharded", *words.format(run=tmp_path).split()]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_module_runs_as_the_process_would_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shown_words.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["qsharded", "merge", "--adapter", "a"])
    front.run_module("shown_words", ["--adapter", "a"])
    assert capsys.readouterr().out == "__main__ ['--adapter', 'a']\n"
