"""The page on each library holds one complete script, and it runs."""

import re
from collections.abc import Iterator
from pathlib import Path

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


@pytest.mark.parametrize("page", PAGES)
def test_its_script_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [script] = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, f"{page}.md", "exec"), {"__name__": "__main__"})
