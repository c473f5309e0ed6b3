"""A command's options as its --help and as a Markdown page.

A command that takes another's options too names the groups that it lists in ``shown_groups``, in place of all.
"""

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, get_origin

from qsharded.config.options import REQUIRED, Command, Option, kind_words, options

_FLAG_COLUMNS = 34
_CONFIG_HELP = "A TOML file with the same keys as the flags, without the dashes in front; flags beat it."


def usage(command: type[Command]) -> str:
    """The one line that says how to call the command; `python -m qsharded.NAME` is the same."""
    return f"{command.prog.replace('.', ' ')} [--config FILE] [--KEY VALUE ...]"


def help_text(command: type[Command], width: int | None = None, *, all_options: bool = False) -> str:
    """The text of --help, `width` columns wide (the terminal's width and at most 100 by default).

    Where the command says which options are `common`, those alone, unless `all_options` is set.
    """
    width = width or min(shutil.get_terminal_size().columns, 100)
    common, listed = _common(command), _listed(command)
    shown = [item for item in listed if all_options or not common or item.name in common]
    groups = (f"{group}\n" + "".join(_entry(item, width) for item in items) for group, items in _groups(shown))
    config = _two_columns("--config FILE", _CONFIG_HELP, width)
    left = len(listed) - len(shown)
    more = [f"{left} more options: --help-all\n"] if left else []
    head = f"usage: {usage(command)}\n{_example(command)}"
    return "\n".join([head, _description(command, width), config, *groups, *more])


def _common(command: type[Command]) -> tuple[str, ...]:
    """The fields that --help shows; none is all."""
    return getattr(command, "common", ())


def _example(command: type[Command]) -> str:
    example = getattr(command, "example", "")
    return f"example: {example}\n" if example else ""


def markdown(command: type[Command]) -> str:
    """The same options as a Markdown page."""
    example = f"For example:\n\n```\n{command.example}\n```\n\n" if hasattr(command, "example") else ""
    head = f"# {command.prog}\n\n```\n{usage(command)}\n```\n\n{example}{_description(command, 120)}\n"
    groups = (f"## {group}\n\n{_TABLE_HEAD}" + "".join(map(_row, items)) for group, items in _groups(_listed(command)))
    return head + f"`--config FILE`: {_CONFIG_HELP}\n\n" + "\n".join(groups)


_TABLE_HEAD = "| flag | meaning | takes | default |\n|---|---|---|---|\n"


def _row(item: Option) -> str:
    cells = (f"`{_flag(item)}`", item.about.help, _takes(item), _default(item))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _listed(command: type[Command]) -> list[Option]:
    """The options of the groups that the command shows; all, where it says nothing of that."""
    shown = getattr(command, "shown_groups", None)
    return [item for item in options(command) if shown is None or item.about.group in shown]


def _groups(items: Iterable[Option]) -> Iterator[tuple[str, Iterator[Option]]]:
    return groupby(items, key=lambda item: item.about.group)


def _description(command: type[Command], width: int) -> str:
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(textwrap.fill(paragraph, width) for paragraph in paragraphs) + "\n"


def _entry(item: Option, width: int) -> str:
    left = _flag(item) if item.kind is bool else f"{_flag(item)} {_metavar(item)}"
    notes = "; ".join(filter(None, [_takes(item), f"default: {_default(item)}"]))
    return _two_columns(left, f"{item.about.help} [{notes}]", width)


def _two_columns(left: str, text: str, width: int) -> str:
    margin = " " * _FLAG_COLUMNS
    right = textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    if len(left) + 4 > _FLAG_COLUMNS:
        return f"  {left}\n{right}\n"
    return f"  {left}".ljust(_FLAG_COLUMNS) + right[_FLAG_COLUMNS:] + "\n"


def _flag(item: Option) -> str:
    return f"--[no-]{item.key}" if item.kind is bool else item.flag


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", tuple[str, ...]: "TEXT", list[float]: "X ..."}


def _metavar(item: Option) -> str:
    if item.about.metavar:
        return item.about.metavar
    if get_origin(item.kind) is dict:
        return "KEY=VALUE ..."
    return "NAME" if item.choices else _METAVARS.get(item.kind, "NAME ...")


def _takes(item: Option) -> str:
    """Choices, unit and range."""
    choices = kind_words(item) if item.choices else ""
    return ", ".join(filter(None, [choices, item.about.unit, item.about.check.words if item.about.check else ""]))


def _default(item: Option) -> str:
    if item.about.unset:
        return item.about.unset
    if item.default is REQUIRED:
        return "none, it is required"
    return _value_words(item.default)


def _value_words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | dict | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
