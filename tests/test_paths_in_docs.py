"""What README, CONTRIBUTING and docs name is there: files, folders, links, and modules to run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("qsharded", "kernels", "csrc", "tests", "benchmarks", "docs", "tools")
FILES = ["/" + str(path.relative_to(ROOT)) for name in FOLDERS for path in (ROOT / name).rglob("*")]

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_IN_FOLDER = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
_SOURCE = re.compile(r"(?<![\w./-])(?!llama\.cpp)[\w./-]+\.(?:py|md|cu|cuh|cpp|h)\b")
_MODULE = re.compile(r"-m ((?:qsharded|benchmarks|tools)(?:\.[a-z_0-9]+)*)")


def missing(page: Path, text: str) -> list[str]:
    """What ``text`` of ``page`` names and the tree does not have."""
    links = {link for link in _LINK.findall(text) if not (page.parent / link).exists()}
    prose = _LINK.sub("", text)
    paths = {path for path in _IN_FOLDER.findall(prose) if not (ROOT / path).exists()}
    sources = {name for name in _SOURCE.findall(prose) if not any(path.endswith("/" + name) for path in FILES)}
    return sorted(links | paths | {name for name in sources if not (ROOT / name).exists()} | _no_modules(prose))


def _no_modules(text: str) -> set[str]:
    places = {name: ROOT / name.replace(".", "/") for name in _MODULE.findall(text)}
    return {name for name, place in places.items() if not (place.with_suffix(".py").exists() or place.is_dir())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page, page.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "see [this](architecture_of_old.md)",
        "in `qsharded/nn/lora.py`",
        "`distributed/sharding.py`",
        "`parallel_fsdp.py`",
        "the folder qsharded/autograd",
        "`python -m qsharded.layout`",
    ],
)
def test_what_is_gone_is_found(text: str) -> None:
    assert len(missing(ROOT / "docs" / "page.md", text)) == 1


def test_the_index_lists_every_page() -> None:
    listed = set(_LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed
