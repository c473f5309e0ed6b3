"""Which column of a row is which field of a format: by its own name, by one that datasets use for it, or as told."""

from collections.abc import Collection, Mapping
from typing import Any

Fields = dict[str, Any]

_SAID = ("output", "response", "answer", "solution")
# format -> the fields that it needs -> other names of theirs. `text` is taken only where no other format is there: it
# is a rendering of the other columns then, as in the original Alpaca, and they say more.
_NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ()},
    "conversations": {"conversations": ("conversation", "dialog", "dialogue")},
    "alpaca": {"instruction": ("question", "query", "problem"), "output": _SAID[1:]},
    "prompt-completion": {"prompt": (), "completion": _SAID},
    "text": {"text": ()},
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "input": ("context",), "history": (), "system": ("system_prompt",), "tools": (),
}  # fmt: skip
_OF_ALPACA = ("input", "history")
FORMATS = tuple(_NEEDED)
FIELDS = (*(field for needed in _NEEDED.values() for field in needed), *_OPTIONAL)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise ValueError unless ``columns`` maps fields of formats to columns."""
    for field, column in columns.items():
        if field not in FIELDS:
            raise ValueError(
                f"--dataset-columns takes FIELD=COLUMN, where FIELD is one of {', '.join(FIELDS)}; got {field!r}"
            )
        if not column:
            raise ValueError(f"--dataset-columns {field}= names no column")


def fields_of(row: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> tuple[str, Fields]:
    """(format, the row by the names of that format's fields); columns that are null are not there, but that an answer
    is empty where without it no format fits.

    Args:
        format: the format, or "auto".
        columns: field -> column of it, for rows that have such a column.

    Raises:
        ValueError: no format fits, or several do.
    """
    present = {key: value for key, value in row.items() if value is not None}
    answers = {
        "output",
        "completion",
        *_SAID,
        *(columns[field] for field in ("output", "completion") if field in columns),
    }
    nothing = {key: "" for key in row if row[key] is None and key in answers}
    try:
        return _fields_of(present, format, columns)
    except ValueError:
        if not nothing:
            raise
    return _fields_of(present | nothing, format, columns)


def _fields_of(present: Fields, format: str, columns: Mapping[str, str]) -> tuple[str, Fields]:
    told = {field: column for field, column in columns.items() if column in present}
    named = {key: value for key, value in present.items() if key not in told.values()}
    named |= {field: present[column] for field, column in told.items()}
    return _Row(named, told, columns).fields(format)


class _Row:
    def __init__(self, present: Fields, told: Mapping[str, str], columns: Mapping[str, str]) -> None:
        self._present = present
        self._told = told
        self._columns = columns

    def fields(self, format: str) -> tuple[str, Fields]:
        name = self._detected() if format == "auto" else format
        found = self._found(name)
        if missing := [field for field, columns in found.items() if not columns]:
            raise ValueError(f"format {name!r} needs {' and '.join(missing)}; {self._listing()}")
        for field, columns in found.items():
            if len(columns) > 1:
                raise ValueError(f"{' and '.join(columns)} could each be {field}: say which, {_how(field, columns[0])}")
        return name, self._by_field(name, {field: columns[0] for field, columns in found.items()})

    def _detected(self) -> str:
        names = self._fitting()
        if len(names) > 1:
            raise ValueError(
                f"the fields fit several formats ({', '.join(names)}): choose one with --dataset-format, or say which "
                f"column is which with --dataset-columns; {self._listing()}"
            )
        if not names:
            known = "; ".join(" + ".join(needed) for needed in _NEEDED.values())
            raise ValueError(
                f"the fields fit no known format ({known}); {self._listing()}; --dataset-columns FIELD=COLUMN says "
                "which column is which"
            )
        return names[0]

    def _fitting(self) -> list[str]:
        """The formats that are there by their fields' own names, else by other names, else text."""
        wanted = self._wanted()
        candidates = [name for name in FORMATS if not wanted or wanted & _NEEDED[name].keys()]
        for fits in (self._has_own, self._has_others):
            if names := [name for name in candidates if name != "text" and fits(name)]:
                return names
        return [name for name in candidates if self._has_own(name)]

    def _wanted(self) -> set[str]:
        """The fields that were told, of those that make a format."""
        return self._told.keys() - _OPTIONAL.keys()

    def _has_own(self, name: str) -> bool:
        return _NEEDED[name].keys() <= self._present.keys()

    def _has_others(self, name: str) -> bool:
        return all(self._found(name).values())

    def _found(self, name: str) -> dict[str, list[str]]:
        """Needed field -> the columns that could be it: its own, or else all of its other names."""
        return {
            field: [field] if field in self._present else [other for other in others if other in self._present]
            for field, others in _NEEDED[name].items()
        }

    def _by_field(self, name: str, needed: Mapping[str, str]) -> Fields:
        fields = {field: self._present[column] for field, column in needed.items()}
        for field, others in _OPTIONAL.items():
            column = next((one for one in (field, *others) if one in self._present), None)
            if column and (name == "alpaca" or field not in _OF_ALPACA):
                fields[field] = self._present[column]
        return fields

    def _listing(self) -> str:
        gone = [column for column in self._columns.values() if column not in self._told.values()]
        told = f" and not {', '.join(gone)}, which --dataset-columns names" if gone else ""
        return f"the row has {', '.join(map(str, self._present)) or 'no fields'}{told}"


def _how(field: str, column: str) -> str:
    return f"as with --dataset-columns {field}={column}"


def refuse_misspelt(present: Collection[str], columns: Mapping[str, str]) -> None:
    """Raise ValueError for a column of ``columns`` that is not among ``present``, those of them that rows have; where
    they have none of them, the columns are for another dataset."""
    for field, column in columns.items():
        if present and column not in present:
            raise ValueError(f"--dataset-columns {field}={column}: no row has a column {column!r}")
