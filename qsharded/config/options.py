"""A command's dataclass: one field is one option of its command line, its TOML file and its documentation.

    @dataclass(frozen=True, kw_only=True)
    class Greet:
        '''Greet somebody.'''

        prog: ClassVar[str] = "qsharded.greet"
        name: str = option("Whom to greet.", group="Greeting")
        times: int = option("How often.", 1, group="Greeting", unit="greetings", check=AT_LEAST_1)

Field types: bool, int, float, str, any of these `| None`, Literal of strings, list[str], list[float], a dict from str
to int, float, str or Any (a value of JSON, or text), str | list[str] (a list of names, or one text that is not a list
of names), tuple[str, ...] (texts taken as they are; the flag is given once for each), and str | tuple[str, ...] (one
such text, or several, behind one flag or with a flag for each). Every other flag is given once.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from qsharded.utils.dates import DATE_IN_WORDS, is_date

REQUIRED: Any = dataclasses.MISSING
NAMES = str | list[str]
TEXTS = str | tuple[str, ...]


class Command(Protocol):
    """What a dataclass must have for its options to be parsed: the program's name, such as `qsharded.train`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    prog: ClassVar[str]


@dataclass(frozen=True)
class Check:
    """Which values an option takes: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Check("above 0", lambda value: value > 0)
AT_LEAST_0 = Check("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Check("at least 1", lambda value: value >= 1)
AT_LEAST_2 = Check("at least 2", lambda value: value >= 2)
DATE = Check(DATE_IN_WORDS, is_date)
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
HUB_NAME = Check("owner/name, or a name for your own account", lambda value: bool(_HUB_NAME.fullmatch(value)))
FRACTION = Check("at least 0 and below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class About:
    """What a field's type and default leave unsaid. `unset` says what happens when no value is given."""

    help: str
    group: str
    unit: str = ""
    unset: str = ""
    metavar: str = ""
    check: Check | None = None


def option(help: str, default: Any = REQUIRED, *, group: str, **about: Any) -> Any:
    """A dataclass field that is an option. `about` takes About's other fields."""
    metadata = {"about": About(help=help, group=group, **about)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def ignored_config_keys(group: str) -> Any:
    """The option of every command that reads a model's config.json."""
    help = (
        "Key of config.json to pass over though it is not known, if you are sure that it changes nothing; the flag is "
        "given once for each."
    )
    return option(help, (), group=group, metavar="NAME")


def push_to_hub(what: str, group: str) -> Any:
    """The option of every command that uploads ``what``."""
    help = (
        f"Hub repository to upload {what} to, with a model card; it is made if need be. The name, the token (HF_TOKEN, "
        "or that of hf auth login) and the right to write are checked at the start. An upload that fails is a warning."
    )
    return option(help, None, group=group, metavar="OWNER/NAME", check=HUB_NAME, unset="nothing is uploaded")


def hub_private(group: str) -> Any:
    """The option that goes with it."""
    help = "Make that repository a private one; one that exists stays as it is. Off makes a new one public."
    return option(help, True, group=group)


@dataclass(frozen=True)
class Option:
    """One option, as the parser, the checks and the documentation see it."""

    name: str
    kind: Any
    optional: bool
    choices: tuple[str, ...]
    default: Any
    about: About

    @property
    def key(self) -> str:
        """The name in TOML; the flag is `--` and this."""
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        return f"--{self.key}"

    @property
    def many(self) -> bool:
        """Whether the command line takes several values."""
        return self.kind in (NAMES, TEXTS) or get_origin(self.kind) in (list, dict)

    @property
    def repeated(self) -> bool:
        """Whether the flag may be given several times, for values that add up."""
        return self.kind == TEXTS or get_origin(self.kind) is tuple


def options(command: type[Command]) -> list[Option]:
    """The options of a command, in the order of its fields."""
    hints = get_type_hints(command)
    return [_option(item, hints[item.name]) for item in dataclasses.fields(command)]


def _option(item: dataclasses.Field[Any], hint: Any) -> Option:
    optional = get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint)
    kind = reduce(or_, (inner for inner in get_args(hint) if inner is not type(None))) if optional else hint
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return Option(item.name, str if choices else kind, optional, choices, default, item.metadata["about"])


def check_values(config: Command) -> None:
    """Check every field's type, choices and range.

    Raises:
        ValueError: naming the flag, the value and what is allowed.
    """
    for item in options(type(config)):
        value = getattr(config, item.name)
        if value is None and item.optional:
            continue
        if not has_kind(value, item.kind) or (item.choices and value not in item.choices):
            raise ValueError(f"{item.flag} must be {kind_words(item)}, got {value!r}")
        if item.about.check and not item.about.check.holds(value):
            raise ValueError(f"{item.flag} must be {item.about.check.words}, got {value!r}")


def has_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's kind; a bool is no number, and neither is NaN or an infinity."""
    if kind == NAMES:
        return isinstance(value, str) or has_kind(value, list[str])
    if kind == TEXTS:
        return isinstance(value, str) or has_kind(value, tuple[str, ...])
    if get_origin(kind) in (list, tuple):
        return isinstance(value, get_origin(kind)) and all(has_kind(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(has_kind(entry, get_args(kind)[1]) for entry in value.values())
    if kind is Any:
        return value is not None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    Any: "a value of JSON, or text",
    list[float]: "a list of finite numbers",
    tuple[str, ...]: "texts",
    TEXTS: "text, or a list of texts",
}


def kind_words(item: Option) -> str:
    """What an option takes, in words."""
    if item.choices:
        return "one of " + ", ".join(item.choices)
    if get_origin(item.kind) is dict:
        return f"KEY=VALUE pairs, each value {_WORDS[get_args(item.kind)[1]]}"
    return _WORDS.get(item.kind, "a list of names")
