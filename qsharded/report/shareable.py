"""Settings of a run as they may be shared: paths of this machine become the names of what they lead to."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsharded.config import TrainConfig, builtin_overrides
from qsharded.config.options import REQUIRED, Option, options
from qsharded.data.sources import configuration_of, is_on_hub, suffix_of
from qsharded.report.markdown import plain

# Where a run is kept and gone on from is no part of what it computes.
_PLACES = (
    "output-dir", "overwrite-output-dir", "resume-from-checkpoint", "data-cache", "ranks", "push-to-hub", "hub-private",
)  # fmt: skip
_HUB_CACHE = "models--", "datasets--"
_BUILTIN = "/qsharded/builtin/"
_COMMAND_COLUMNS = 90


def name_of(path: str) -> str:
    """The name of what a path leads to; a Hub id, and what lies in the Hub's cache, keeps its owner/name."""
    if _BUILTIN in path:
        return f"the built-in {path.partition(_BUILTIN)[2]}"
    parts = Path(path).parts
    cached = next((part for part in parts if part.startswith(_HUB_CACHE)), None)
    if cached is not None:
        return "/".join(cached.split("--")[1:])
    is_id = len(parts) <= 2 and not path.startswith(("/", "~", ".")) and not Path(path).exists()
    return path if is_id else Path(path).name


def hub_id(name: str) -> str | None:
    """The Hub's owner/name of a model or dataset; None of what lies on this machine and is not in the Hub's cache."""
    configured = configuration_of(name)
    source = configured[0] if configured else name
    if is_on_hub(source):
        return "/".join(source.split("/")[:2])
    shown = name_of(source)
    return shown if shown.count("/") == 1 and not suffix_of(shown) else None


def linked(base: str) -> str:
    """In Markdown, a model's name, with its page on the Hub if it has one."""
    found = hub_id(base)
    return f"[{plain(found)}](https://huggingface.co/{found})" if found else plain(name_of(base))


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``given``, by key, that are others than the defaults, with names in place of paths.

    The built-in run's own are its defaults where it is the built-in model that is trained.
    """
    builtin = _builtin(given)
    defaults = {item.key: _plain(item.default) for item in options(TrainConfig) if item.default is not REQUIRED}
    all_given = dict.fromkeys(builtin) | dict(given)  # what the built-in run has and this one has not is None
    changed = {key: value for key, value in all_given.items() if _plain(value) != (defaults | builtin).get(key)}
    return all_settings(changed)


def all_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, by key, with names in place of paths, less what says where a run is kept."""
    known = {item.key: item for item in options(TrainConfig)}
    return {key: _shown(known.get(key), value) for key, value in given.items() if key not in _PLACES}


def command(given: Mapping[str, Any], ranks: int, nodes: int = 1) -> str:
    """The command that trains with these settings, on so many ranks, once the files it names are there."""
    words = [word for key, value in settings(given).items() for word in _words(key, value)]
    if nodes > 1:
        start = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(ranks // nodes), "-m", "qsharded.train"]
    else:
        start = ["qsharded", "train"]
        words += ["--ranks", str(ranks)]
    return shlex.join([*start, *words])


def in_lines(words: str) -> str:
    """A long command with an option a line, as a shell takes it."""
    if len(words) <= _COMMAND_COLUMNS:
        return words
    lines: list[list[str]] = [[]]
    for word in shlex.split(words):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))


def _builtin(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the built-in run sets, where its model is trained."""
    if _BUILTIN not in str(given.get("model")):
        return {}
    return {name.replace("_", "-"): _plain(value) for name, value in builtin_overrides({}).items()}


def _plain(value: Any) -> Any:
    """For comparing: a tuple as TOML gives it back, and built-in files wherever the package lies."""
    if isinstance(value, str) and _BUILTIN in value:
        return name_of(value)
    return list(value) if isinstance(value, tuple) else value


def _shown(item: Option | None, value: Any) -> Any:
    if item is None or not item.about.metavar.startswith(("PATH", "FILE", "[NAME=]PATH")):
        return value
    if isinstance(value, list):
        return [_one(entry) for entry in value]
    return _one(value) if isinstance(value, str) else value


def _one(text: str) -> str:
    label, equals, path = text.partition("=")
    return f"{label}={name_of(path)}" if equals and not Path(text).exists() else name_of(text)


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}", *(f"{name}={_entry(entry)}" for name, entry in value.items())]
    return [f"--{key}", "" if value is None else str(value)]


def _entry(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
