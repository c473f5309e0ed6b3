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
    """Each domain's text. Files come in a shuffled order that is always the same."""
    library, headers = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent / "include"
    return {
        "prose": prose.read_text(encoding="utf-8"),
        "Python": _joined([*library.glob("*.py"), *(library / "asyncio").glob("*.py")]),
        "C++": _joined([*(headers / "ATen").glob("*.h"), *(headers / "c10").rglob("*.h")]),
        "Markdown": _joined([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]),
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
    ordered = sorted(paths)
    random.Random(0).shuffle(ordered)
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in ordered)


def write_rows(text: str, path: Path) -> Path:
    """The part to calibrate on, as a dataset."""
    part = text[: int(len(text) * _PART)]
    rows = (json.dumps({"text": part[at : at + _ROW]}) + "\n" for at in range(0, len(part), _ROW))
    path.write_text("".join(rows), encoding="utf-8")
    return path


def measured(text: str) -> str:
    """The part to measure."""
    return text[int(len(text) * _PART) :]
