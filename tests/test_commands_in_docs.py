"""Every command that README, CONTRIBUTING, docs/ and --help show is one that the parser takes; scripts have a test."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qsharded import train
from qsharded.config import builtin_overrides, parse, parse_train
from tests.examples.test_recipes import SHAPES
from tests.test_docs import PAGES as SCRIPTS_OF_LIBRARIES
from tools.make_docs import PAGES

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
CONFIGS = {config.prog.removeprefix("qsharded."): config for config in PAGES.values()}
POSITIONAL = {"compare": "--runs", "inspect": "--path"}
# Pages whose scripts are run, and by what.
RUN = {
    "python": {"README.md": "test_docs", "operations.md": "test_docs"}
    | {f"{page}.md": "test_docs" for page in SCRIPTS_OF_LIBRARIES},
    "bash": {"watch.md": "test_watch_docs", "multi-node.md": "test_slurm_script", "plan.md": "test_commands_in_docs"}
    | dict.fromkeys(("share.md", "serve.md"), "test_share_docs"),
    "console": {"tour.md": "test_tour"},
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"(?:^|(?<=[\s|(]))(?:python -m )?qsharded ([a-z]+)(?= |$)|-m qsharded\.([a-z]+)")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, script) of each block."""
    yield from _BLOCK.findall(text)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, words) of each command of ours in a text's blocks."""
    for language, block in blocks(text):
        script = "".join(re.findall(r"^\$ .*\n", block, re.MULTILINE)) if language == "console" else block
        for line in re.sub(r"\\\n\s*", "", script).splitlines():
            found = None if language == "python" or "[--KEY" in line else list(_COMMAND.finditer(line))
            if found:
                yield found[-1][1] or found[-1][2], words_of(line[found[-1].end() :])


def words_of(rest: str) -> list[str]:
    """As a shell would take them, up to what is for the shell itself."""
    lexer = shlex.shlex(rest, posix=True, punctuation_chars="&|;<>")
    lexer.commenters = "#"
    lexer.whitespace_split = True
    words = list(lexer)
    return words[: next((n for n, word in enumerate(words) if set(word) <= set("&|;<>")), len(words))]


def parsed(name: str, words: list[str]) -> Any:
    """The command's options; SystemExit where it takes them not."""
    if name in ("train", "plan"):
        return parse_train([*(["--dry-run"] if name == "plan" else []), *words])
    first = [POSITIONAL[name]] if name in POSITIONAL and words and not words[0].startswith("-") else []
    has_model = any(field.name == "model" for field in fields(CONFIGS[name]))
    fill = builtin_overrides if name == "preview" else lambda given: {"model": "m"} if has_model else {}
    return parse([*first, *words], CONFIGS[name], fill=fill)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the settings file that commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('model = "m"\ndataset = "d"\n')
    return tmp_path


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_ones_that_are_taken(page: Path) -> None:
    for name, words in commands(page.read_text(encoding="utf-8")):
        parsed(name, words)


def test_commands_are_found_wherever_they_stand() -> None:
    text = (
        "```\nqsharded chat --adapter a   # talk\n```\n```bash\ntorchrun --nnodes 2 \\\n  -m qsharded.train \\\n"
        "  --model m --dataset d &\n```\n"
        "```console\n$ printf 'x' | qsharded generate --prompt 'a b' > o.txt\nqsharded said this\n```\n"
    )
    assert list(commands(text)) == [
        ("chat", ["--adapter", "a"]),
        ("train", ["--model", "m", "--dataset", "d"]),
        ("generate", ["--prompt", "a b"]),
    ]
    with pytest.raises(SystemExit):
        parsed("chat", ["--adaptor", "a"])
    with pytest.raises(SystemExit):
        parsed("train", ["--model", "m"])


def test_pages_that_people_start_from_have_commands() -> None:
    found = {name for page in TEXTS for name, _ in commands(page.read_text(encoding="utf-8"))}
    assert found >= {*CONFIGS, "plan"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.prog)
def test_the_example_of_help_is_taken_and_stands_on_its_page(config: Any) -> None:
    [[name, words]] = commands(f"```\n{config.example}\n```")
    assert config.prog == f"qsharded.{name}"
    parsed(name, words)
    assert config.example in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_every_script_has_a_test_that_runs_it() -> None:
    found: dict[str, set[str]] = {"": set()}
    for page in TEXTS:
        for language, _ in blocks(page.read_text(encoding="utf-8")):
            found.setdefault(language, set()).add(page.name)
    assert {language: pages for language, pages in found.items() if language} == {
        language: set(pages) for language, pages in RUN.items()
    }
    for test in {test for pages in RUN.values() for test in pages.values()}:
        assert (ROOT / "tests" / f"{test}.py").is_file()


def test_make_has_the_targets_that_are_shown() -> None:
    shown = {
        target
        for page in TEXTS
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert {"train", "test", "lint"} <= shown <= set(phony[1].split())


def test_the_plans_of_plan_md_say_what_the_page_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps(SHAPES["meta-llama/Llama-3.1-70B-Instruct"]))
    said = []
    for _, words in commands((ROOT / "docs" / "plan.md").read_text(encoding="utf-8")):
        given = [str(folder) if word.startswith("meta-llama/") else word for word in words]
        with pytest.raises(SystemExit) as leave:
            train.main(["--dry-run", *given])
        said.append((leave.value.code, capsys.readouterr().out))
    (fits, two), (does_not, one), (small, swept) = said
    assert (fits, does_not, small) == (0, 1, 0)
    assert two.startswith("verdict: fits")
    assert one.startswith("verdict: DOES NOT FIT")
    assert one.splitlines()[1] == "what fits, one of:"
    assert "tokens/s are estimates" in swept
