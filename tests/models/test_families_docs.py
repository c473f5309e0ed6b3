"""README and docs list the families of the registry."""

from qsharded.models.families import FAMILIES
from tools import families
from tools.make_docs import DOCS, README


def test_the_lists_are_those_of_the_registry() -> None:
    assert (DOCS / "models.md").read_text().startswith(families.page())
    assert README.read_text() == families.in_readme(README.read_text())
    assert all(family.title in README.read_text() for family in FAMILIES.values())
