"""Imports point down the layers that CONTRIBUTING.md lists, in functions too."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base in (ROOT, ROOT / "kernels")
    for path in base.glob("qsharded*/**/*.py")
}


@dataclass(frozen=True)
class Import:
    """``importer`` names ``imported``, both modules of ours; inside a function, or for type checkers alone."""

    importer: str
    imported: str
    in_function: bool = False
    for_types: bool = False


def layers() -> list[list[str]]:
    """The first column of the table, top line first."""
    table = re.search(r"^Imports point down only.*?```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert table
    return [re.split(r" {2,}", line)[0].split() for line in table[1].splitlines()]


def imports(importer: str, node: ast.AST, in_function: bool = False, for_types: bool = False) -> Iterator[Import]:
    """Our modules that ``node``, of ``importer``'s source, imports."""
    in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for_types |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        source = ".".join(filter(None, (_package_of(importer, node.level), node.module)))
        named = [f"{source}.{alias.name}" for alias in node.names]
        names = [name if name in FILES else source for name in named]
    ours = {name for name in names if name.partition(".")[0] in ("qsharded", "qsharded_kernels")}
    yield from (Import(importer, name, in_function, for_types) for name in sorted(ours))
    for child in ast.iter_child_nodes(node):
        yield from imports(importer, child, in_function, for_types)


def _package_of(importer: str, level: int) -> str:
    """What the dots of a relative import stand for; "" for none."""
    if not level:
        return ""
    up = level - (FILES[importer].name == "__init__.py")
    return ".".join(importer.split(".")[: -up or None])


def package(module: str) -> str:
    """The name in the table; "" for ``qsharded`` itself, which is below all: it has the version."""
    first, *rest = module.split(".")
    return first if first != "qsharded" else (rest or [""])[0]


def points_down(found: Import, ranks: dict[str, int]) -> bool:
    """Whether it stays in its package or goes to a lower line of the table."""
    above, below = package(found.importer), package(found.imported)
    return above == below or ranks[above] < ranks[below]


IMPORTS = [found for name, path in FILES.items() for found in imports(name, ast.parse(path.read_text()))]
RANKS = {name: rank for rank, names in enumerate([*layers(), [""]]) for name in names}


def test_every_package_and_top_module_has_a_layer() -> None:
    assert {package(name) for name in FILES} == set(RANKS)


def test_imports_point_down() -> None:
    assert [found for found in IMPORTS if not found.for_types and not points_down(found, RANKS)] == []


def test_only_names_that_load_late_are_imported_for_types_alone() -> None:
    assert {found.importer for found in IMPORTS if found.for_types} <= {"qsharded", "qsharded.data"}


def test_optional_packages_are_imported_when_they_are_asked_for() -> None:
    outside = [found for found in IMPORTS if package(found.imported) == "integrations" != package(found.importer)]
    assert all(found.in_function for found in outside), outside


def test_no_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if not (found.in_function or found.for_types or found.importer == found.imported):
            graph.setdefault(found.importer, set()).add(found.imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize(
    "source",
    [
        "from qsharded.training import setup",
        "import qsharded.training.setup",
        "from qsharded import training",
        "def late():\n    from qsharded.training.setup import prepare",
        "class Late:\n    async def late(self):\n        if True:\n            import qsharded.train",
        "from ..training import setup",
        "from .. import train",
        "from qsharded.checkpoint import files",  # beside it, on the same line of the table
    ],
)
def test_an_import_that_points_up_is_seen(source: str) -> None:
    (found,) = imports("qsharded.data.batches", ast.parse(source))
    assert not points_down(found, RANKS)


COLLECTIVE = re.compile(r"(all_|reduce|gather|broadcast|scatter|barrier|send|recv|batch_isend)")


def test_collectives_have_one_home() -> None:
    """One that takes None for a process alone, so that no caller has to ask whether there are other ranks."""
    calling = {
        module
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed")
        if COLLECTIVE.match(node.attr)
    }
    assert calling == {"qsharded.utils.collectives"}
