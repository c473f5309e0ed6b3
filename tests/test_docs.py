"""The page on each library holds one complete script, and it runs; so do the examples of the operations."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qsharded
from qsharded.integrations import bitsandbytes, peft
from tools import operations

DOCS = Path(qsharded.__file__).parent.parent / "docs"
PAGES = ("transformers", "peft", "bitsandbytes", "gguf")


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    peft.uninstall()
    bitsandbytes.uninstall()


def test_the_examples_of_the_operations_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "operations.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1 + len(qsharded_operations())
    exec(compile("".join(blocks), "operations.md", "exec"), {"__name__": "__main__"})


def qsharded_operations() -> list[str]:
    """Those that `dir` finds are those that were asked for already: the registry knows all."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    return [name for name in names if name.startswith("qsharded::")]


def test_the_page_of_the_operations_is_up_to_date() -> None:
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    assert text == operations.page()
    headings = re.findall(r"^## (nf4_\w+)$", text, re.MULTILINE)
    assert {f"qsharded::{name}" for name in headings} == set(qsharded_operations())


def test_an_operation_without_a_description_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = operations.schemas()
    monkeypatch.setattr(operations, "schemas", lambda: [*found, "nf4_new(Tensor x) -> Tensor"])
    with pytest.raises(ValueError, match="nf4_new"):
        operations.page()


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
