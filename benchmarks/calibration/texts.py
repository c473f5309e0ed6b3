"""Texts of four domains: prose that is given, and what lies on any machine that runs this."""

import json
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CALIBRATED = "prose", "Python"
_PART = 0.6  # of a text that is calibrated on; what is measured lies behind it
_ROW = 4000  # characters


def texts(prose: Path) -> dict[str, str]:
    """Each domain's text."""
    return {"prose": text_of(str(prose))} | {domain: text_of(domain) for domain in _found()}


def text_of(source: str) -> str:
    """Of a domain that lies on the machine, by its name, or of a file."""
    found = _found().get(source)
    return _joined(found) if found else Path(source).read_text(encoding="utf-8")


def _found() -> dict[str, list[Path]]:
    library, headers = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent / "include"
    return {
        "Python": [*library.glob("*.py"), *(library / "asyncio").glob("*.py")],
        "C++": [*(headers / "ATen").glob("*.h"), *(headers / "c10").rglob("*.h")],
        "Markdown": [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")],
    }


def origins() -> dict[str, str]:
    """Where they are from, for the record."""
    return {
        "prose": "the file that was given",
        "Python": "Python's standard library",
        "C++": "headers of ATen and c10 in the torch package",
        "Markdown": "the pages of this repository",
    }


def _joined(paths: Iterable[Path]) -> str:
    """Files in a shuffled order that is always the same."""
    ordered = sorted(paths)
    random.Random(0).shuffle(ordered)
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in ordered)


def write_rows(text: str, path: Path, characters: int = _ROW) -> Path:
    """The part to calibrate or train on, as a dataset."""
    return _write(text[: int(len(text) * _PART)], path, characters)


def measured(text: str) -> str:
    """The part to measure."""
    return text[int(len(text) * _PART) :]


def write_measured_rows(text: str, path: Path, characters: int, most: int) -> Path:
    """Rows of the whole of the part to measure, at even distances; ``most`` of them."""
    part = measured(text)
    return _write(part, path, characters, max(1, -(-len(part) // characters) // most), most)


def _write(part: str, path: Path, characters: int, stride: int = 1, most: int | None = None) -> Path:
    starts = range(0, len(part), characters)[::stride][:most]
    rows = (json.dumps({"text": part[at : at + characters]}) + "\n" for at in starts)
    path.write_text("".join(rows), encoding="utf-8")
    return path
