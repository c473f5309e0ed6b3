"""The page on each library holds one complete script, and it runs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qsharded
from qsharded.integrations import bitsandbytes, peft

DOCS = Path(qsharded.__file__).parent.parent / "docs"
PAGES = ("transformers", "peft", "bitsandbytes", "gguf")


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    peft.uninstall()
    bitsandbytes.uninstall()


def ran(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's only Python block leaves."""
    [script] = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script, page.name, "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_its_script_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(DOCS / f"{page}.md", tmp_path, monkeypatch)


def test_the_readmes_block_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ran(DOCS.parent / "README.md", tmp_path, monkeypatch)
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "LoRALinear"
    assert type(names["other"][0]).__name__ == "PackedLinear"
    # half of NF4's widest gap, of a block's largest weight
    assert 0 < names["error"] < 0.16 * names["matrix"].abs().max()
