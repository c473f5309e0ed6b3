import re
import shlex
from pathlib import Path

import pytest

from qsharded.config import TrainConfig, parse
from qsharded.config.options import options
from qsharded.config.rendering import help_text, markdown
from tools.make_docs import DOCS, PAGES, README, in_readme, models_page


def test_every_option_is_documented_in_one_group() -> None:
    groups = [item.about.group for item in options(TrainConfig)]
    starts = [group for before, group in zip([None, *groups], groups, strict=False) if group != before]
    assert len(starts) == len(set(starts)), "a group's options stand together"
    for item in options(TrainConfig):
        assert item.about.group
        assert item.about.help.endswith("."), item.key


@pytest.mark.parametrize("width", [60, 80, 100])
def test_help_fits_the_width_and_lists_every_flag_with_its_default(width: int) -> None:
    text = help_text(TrainConfig, width, all_options=True)
    assert max(map(len, text.splitlines()[2:])) <= width  # usage and example are to be copied, so not broken
    for item in options(TrainConfig):
        name = f"--[no-]{item.key}" if item.kind is bool else item.flag
        assert any(line.split() and line.split()[0] == name for line in text.splitlines()), item.key
    assert " ".join(text.split()).count("default: ") == len(options(TrainConfig))


def test_help_shows_units_ranges_and_choices() -> None:
    flat = " ".join(help_text(TrainConfig, 100, all_options=True).split())
    assert "--max-length N Longest row. [tokens, at least 1; default: 2048]" in flat
    assert "[one of cosine, linear, constant; default: cosine]" in flat
    assert "[default: the built-in one]" in flat
    assert "--lora-rank-pattern KEY=VALUE ..." in flat


def test_help_shows_the_twenty_options_that_people_use_and_an_example_on_top() -> None:
    shown = set(re.findall(r"^  --(?:\[no-\])?([\w-]+)", help_text(TrainConfig, 100), re.MULTILINE))
    assert shown == {"config", *(name.replace("_", "-") for name in TrainConfig.common)}
    assert len(TrainConfig.common) == 20
    usage, example, *_, more = help_text(TrainConfig, 100).strip().splitlines()
    assert usage.startswith("usage: qsharded train ")
    assert more == f"{len(options(TrainConfig)) - 20} more options: --help-all"
    words = shlex.split(example.removeprefix("example: qsharded train "))
    assert parse(words, TrainConfig).dataset == "rows.jsonl"


@pytest.mark.parametrize("page", PAGES)
def test_a_commands_example_is_one(page: str, tmp_path: Path) -> None:
    command = PAGES[page]
    name, *words = shlex.split(getattr(command, "example", command.prog.replace(".", " ")))[1:]
    assert name == command.prog.partition(".")[2]
    if first := {"inspect": "--path", "compare": "--runs"}.get(name):
        words = [first, *words]  # as its main does
    fill = {"model": "m"} if "model" in {item.name for item in options(command)} else {}
    parse(words, command, fill=lambda given: fill)


def test_markdown_has_a_row_for_every_option() -> None:
    rows = [line for line in markdown(TrainConfig).splitlines() if line.startswith("| `--")]
    assert len(rows) == len(options(TrainConfig))
    assert "| `--max-length` | Longest row. | tokens, at least 1 | 2048 |" in rows


@pytest.mark.parametrize("page", PAGES)
def test_docs_are_in_step(page: str) -> None:
    written = Path(DOCS / page).read_text(encoding="utf-8")
    assert written == markdown(PAGES[page]), "run `make docs`"


def test_the_models_page_and_readme_list_what_is_tested() -> None:
    assert (DOCS / "models.md").read_text(encoding="utf-8") == models_page(), "run `make docs`"
    readme = README.read_text(encoding="utf-8")
    assert "Helium, " in readme
    assert readme == in_readme(readme), "run `make docs`"
