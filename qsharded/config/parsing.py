"""Flags and TOML to a command's dataclass: flags beat the TOML file, which beats the defaults."""

import argparse
import difflib
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from qsharded.config.options import REQUIRED, Command, Option, options
from qsharded.config.other_names import done_by_itself, other_names
from qsharded.config.rendering import help_text, usage
from qsharded.config.values import from_toml, from_words, to_toml

T = TypeVar("T", bound=Command)
Given = dict[str, Any]


def parse(argv: Sequence[str], command: type[T], *, fill: Callable[[Mapping[str, Any]], Given] | None = None) -> T:
    """A command's options from its arguments; a mistake is printed the way argparse does, and exits with 2.

    `fill` receives what the user gave (field name to value) and returns values for fields that were not given.
    """
    parser = _Parser(command)
    parser.show_help(argv)
    try:
        given = _given(parser, argv)
        values = {**(fill(given) if fill else {}), **given}
        _refuse_missing(command, values)
        return command(**values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def write_toml(config: Command) -> str:
    """The options as a TOML file that `--config` reads back to an equal config; what is unset is left out."""
    values = ((item, getattr(config, item.name)) for item in options(type(config)))
    return "".join(f"{item.key} = {to_toml(value)}\n" for item, value in values if value is not None)


def read_toml(path: Path, command: type[Command]) -> Given:
    """The options that a TOML file sets, by field name; keys are written with - or _.

    Raises:
        ValueError: naming the file, for a file that is no TOML and for an unknown or repeated key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return _from_table(table, {item.name: item for item in options(command)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Parser(argparse.ArgumentParser):
    def __init__(self, command: type[Command]) -> None:
        super().__init__(prog=command.prog, usage=usage(command), add_help=False, allow_abbrev=False)
        self.command = command
        self.known = {item.name: item for item in options(command)}
        self.spelled: dict[str, str] = {}  # field name -> how the command line gave it
        self.add_argument("--config", action=_Once, default=argparse.SUPPRESS)
        for item in self.known.values():
            _add(self, item)

    def show_help(self, argv: Sequence[str]) -> None:
        if not {"-h", "--help", "--help-all"} & set(argv):
            return
        # Once, not once a rank.
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(help_text(self.command, all_options="--help-all" in argv))
        raise SystemExit(0)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help-all lists every option)\n")


class _Once(argparse.Action):
    """Keeps what a flag is given, once: of two values one would be lost without a word."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        value = self.const if self.nargs == 0 else values
        words = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
        spelled = " ".join([option_string or "", *words])
        if self.dest in parser.spelled:
            flag = f"--{self.dest.replace('_', '-')}"
            raise ValueError(
                f"{flag} is given twice, as {parser.spelled[self.dest]!r} and as {spelled!r}: give it once"
            )
        parser.spelled[self.dest] = spelled
        setattr(namespace, self.dest, value)


def _add(parser: _Parser, item: Option) -> None:
    once = partial(parser.add_argument, dest=item.name, action=_Once, default=argparse.SUPPRESS)
    if item.kind is bool:
        # with a value too: transformers' users write --packing True
        once(item.flag, nargs="?", const=True)
        once(f"--no-{item.key}", nargs=0, const=False)
    elif item.repeated:
        parser.add_argument(item.flag, nargs="+" if item.many else 1, action="extend", default=argparse.SUPPRESS)
    else:
        once(item.flag, nargs="*" if item.many else 1)


def _given(parser: _Parser, argv: Sequence[str]) -> Given:
    arguments, rest = parser.parse_known_args([_dashes(word) for word in argv])
    _refuse_rest(parser.known, rest)
    flags = vars(arguments)
    path = flags.pop("config", None)
    table = read_toml(_config_file(path), parser.command) if path else {}
    return {**table, **{name: _value(parser.known[name], words) for name, words in flags.items()}}


def _config_file(path: str) -> Path:
    """The file; where it is missing a ValueError names the folder that was looked at, and the TOML files there."""
    file = Path(path)
    if file.exists():
        return file
    folder = file.parent.absolute()
    if not folder.is_dir():
        raise ValueError(f"--config {path} is missing, and so is the folder {folder}")
    others = sorted(one.name for one in folder.glob("*.toml"))
    raise ValueError(f"--config {path} is missing; {folder} has {', '.join(others) or 'no .toml file'}")


def _value(item: Option, words: Any) -> Any:
    return _switch(words) if item.kind is bool else from_words(item, words)


def _switch(word: bool | str) -> bool | str:
    """A word that is neither true nor false comes back as it is; the checks have the message."""
    return word if isinstance(word, bool) else {"true": True, "false": False}.get(word.lower(), word)


def _dashes(word: str) -> str:
    """--lora_r as --lora-r: transformers' own parser takes both."""
    name, separator, value = word.partition("=")
    return name.replace("_", "-") + separator + value if name.startswith("--") else word


def _from_table(table: Mapping[str, Any], known: Mapping[str, Option]) -> Given:
    given: Given = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(_unknown(key, known))
        if name in given:
            raise ValueError(f"key {key!r} is given twice, with - and with _")
        given[name] = from_toml(known[name], value)
    return given


def _refuse_rest(known: Mapping[str, Option], rest: Sequence[str]) -> None:
    for word in rest:
        if word.startswith("-"):
            raise ValueError(_unknown(word.lstrip("-").partition("=")[0], known))
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; values follow a --key")


def _unknown(key: str, known: Mapping[str, Option]) -> str:
    keys = ["config", *(item.key for item in known.values())]
    spelled = key.replace("_", "-")
    if why := done_by_itself(spelled):
        return f"unknown key {key!r}; leave it out: {why}"
    nearest = other_names(spelled, keys) or difflib.get_close_matches(spelled, keys, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")


def _refuse_missing(command: type[Command], values: Mapping[str, Any]) -> None:
    for item in options(command):
        if item.default is REQUIRED and item.name not in values:
            raise ValueError(f"{item.flag} is required")
