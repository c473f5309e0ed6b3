"""docs/tour.md: what its script notices. Its commands are run by .ci/wheel, with the wheel's own `qsharded`."""

import re
import sys
from pathlib import Path

import pytest

from qsharded.__main__ import SUBCOMMANDS
from tools import make_tour

PAGE = make_tour.PAGE.read_text(encoding="utf-8")


def names(part: str) -> set[str]:
    return {name for command, _ in make_tour.commands(part) for name in re.findall(r"\bqsharded (\w+)", command)}


def test_it_shows_each_step_of_a_first_day_on_both_models() -> None:
    steps = {"preview", "plan", "train", "compare", "generate", "chat", "merge", "inspect"}
    first = make_tour.builtin_part(PAGE)
    assert steps | {"doctor"} == names(first)
    assert names(PAGE.removeprefix(first)) == steps
    assert names(PAGE) <= set(SUBCOMMANDS)


def test_every_command_has_printed_something() -> None:
    silent = {command for command, output in make_tour.commands(PAGE) if not output.strip()}
    assert all(" > " in command for command in silent)


def test_no_folder_user_or_kernel_of_a_machine_is_in_it() -> None:
    outputs = "".join(output for _, output in make_tour.commands(PAGE))
    assert not re.search(r"(?<![\w.~])/(tmp|home|root|work|usr|opt|mnt)\b|Linux-", outputs)
    folder = Path("/x/y")
    said = f"data /venv/lib/qsharded/builtin/train.jsonl in {folder}/output, {Path.home()}/.cache, Linux-6.1-x86_64  \n"
    shown = "data .../qsharded/builtin/train.jsonl in ./output, ~/.cache, Linux\n"
    assert make_tour.shareable(said, folder) == shown


@pytest.fixture
def one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A page of a program, `qsharded train`, that stands beside this Python."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(make_tour.Path, "home", lambda: Path("/nobody"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qsharded"
    program.write_text(
        '#!/bin/sh\nfor n in 1 2; do echo "step $n/2 loss 0.$n of $# words, $CUDA_VISIBLE_DEVICES"; done\n'
    )
    program.chmod(0o755)
    (tmp_path / "empty").mkdir()
    return "# Tour\n\n```console\n$ qsharded train\nstep 1/9 loss 4.5e-03 of 12 words,\n```\n"


def test_a_page_with_lines_of_these_kinds_passes_and_another_does_not(one_command: str, tmp_path: Path) -> None:
    assert make_tour.check(one_command, tmp_path / "empty") == 0
    assert make_tour.check(one_command.replace("loss", "cost"), tmp_path / "empty") == 1
    assert make_tour.check(one_command.replace("words,\n", "words,\ndone\n"), tmp_path / "empty") == 1


def test_the_page_is_written_with_what_is_printed_now(one_command: str, tmp_path: Path) -> None:
    page = f"{one_command}{make_tour.SECOND_PART}\n\n```console\n$ qsharded chat a\nlast year's\n```\n"
    now = "step 1/2 loss 0.1 of {0} words,\nstep 2/2 loss 0.2 of {0} words,\n"
    again = make_tour.written(page, tmp_path / "empty", None, None)
    assert f"$ qsharded train\n{now.format(1)}```" in again
    assert "last year's" in again
    (tmp_path / "model").mkdir()
    again = make_tour.written(page, tmp_path / "empty", tmp_path / "model", tmp_path / "text")
    assert f"$ qsharded chat a\n{now.format(2)}```\n" in again
    assert "last year's" not in again


def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such thing\n\nexit status 3"):
        make_tour.printed("echo no such thing; exit 3", tmp_path)


@pytest.mark.parametrize(
    ("line", "other", "alike"),
    [
        ("step 0/150 eval_loss 11.34 lr 1e-03", "step 2/2 eval_loss 8.374e+04 lr 3.5e-7", True),
        ("  'cheer cat' -> 'T-A-C' (right)", "  'cheer dog' -> 'D' (wrong, should be 'G-O-D')", True),
        ("time  1 min 20 s  9 s", "time  3 s  5 s", True),
        ("peak memory, GiB  0.5", "peak memory, GiB  12", True),
        ("step 0/150 eval_loss 11.34", "step 0/150 loss 11.34", False),
        ("verdict: fits, 0.8 GiB", "verdict: DOES NOT FIT, 0.8 GiB", False),
        ("adapter written to output/rank-16/adapter", "adapter written to output/rank/adapter", False),
    ],
)
def test_figures_may_differ_and_words_may_not(line: str, other: str, alike: bool) -> None:
    assert (make_tour.differences("qsharded train", line, other) == []) is alike


def test_what_a_model_or_a_machine_says_may_differ() -> None:
    assert make_tour.differences("qsharded generate", "T-A-C", "cat") == []
    assert make_tour.differences("qsharded generate", "T-A-C", "") != []
    assert make_tour.differences("qsharded doctor", "ok      torch 1", "ok      torch 2, CUDA") == []
    assert make_tour.differences("qsharded doctor", "ok      torch 1", "broken  torch 1") != []
