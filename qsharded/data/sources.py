"""Which files a dataset is made of: a file, a folder, or a dataset repository on the Hugging Face Hub."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
# Read through the `datasets` package, and from a folder only where it has none of the others.
_PACKED = [f".{kind}.{by}" for kind in ("jsonl", "json", "csv", "tsv") for by in ("gz", "zst", "bz2", "xz")]
MORE_SUFFIXES = (".csv", ".tsv", ".arrow", *_PACKED)
# Written beside the rows by the Hub and by `datasets`; not rows themselves.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SAVED = "data"  # what `save_to_disk` of `datasets` calls its files, in a folder for each split
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


def find_files(source: str | Path, split: str) -> list[Path]:
    """The files that hold ``split``, in name order.

    A file is taken whatever its name. In a folder and on the Hub, names tell the split, as in ``data/val.jsonl``,
    ``train-00000-of-00002.parquet``, ``test/part-1.json``; where no name mentions one, all files are ``train``.

    Args:
        source: a file, a folder (searched in depth), or a Hub dataset: ``owner/name``, ``owner/name/folder`` or
            ``owner/name/file``.

    Raises:
        ValueError: no such source, a file type that is not read, no file of that split, or a Hub repository whose
            files are of several types or folders, so that reading all would mix them.
    """
    if source == "":
        raise ValueError("a dataset's name is empty; for the current folder write .")
    path = Path(source)
    if path.is_file():
        return [_checked(path)]
    if path.is_dir():
        return [path / name for name in choose_split(_names_in(path), split, str(source))]
    if _is_hub_id(str(source)):
        return _from_hub(str(source), split)
    raise ValueError(f"{source} is no file, no folder and no Hub dataset id such as owner/name")


def suffix_of(name: str) -> str:
    """What the name of a file ends in that tells its type, in small letters; "" if it is none that is read."""
    return next((suffix for suffix in SUFFIXES + MORE_SUFFIXES if name.lower().endswith(suffix)), "")


def configuration_of(source: str | Path) -> tuple[str, str] | None:
    """(dataset, configuration) of a name such as ``owner/name:configuration``; None if that is a path or names none."""
    name, colon, configuration = str(source).rpartition(":")
    is_named = colon and re.fullmatch(r"[\w.-]+", configuration) and not Path(source).exists()
    return (name, configuration) if is_named and (Path(name).is_dir() or _is_hub_id(name)) else None


def is_on_hub(source: str | Path) -> bool:
    """Whether it is nothing on this machine, and could be the id of a dataset on the Hub."""
    return not Path(source).exists() and _is_hub_id(str(source))


def choose_split(names: Iterable[str], split: str, source: str) -> list[str]:
    """The names that belong to ``split``; ``source`` names their home in errors."""
    splits_of = {name: _splits_of(PurePosixPath(name)) for name in sorted(names)}
    wanted = SPLIT_OF_WORD.get(split, split)
    if chosen := [name for name, splits in splits_of.items() if wanted in splits]:
        return chosen
    if wanted == "train" and not any(splits_of.values()):
        chosen = list(splits_of)
    if not chosen:
        listing = ", ".join(list(splits_of)[:10]) or f"no {', '.join(SUFFIXES + MORE_SUFFIXES[:3])} file at all"
        raise ValueError(f"{source} has no {split!r} split; it has {listing}")
    return chosen


def _splits_of(name: PurePosixPath) -> set[str]:
    """What splits the file's name speaks of, or else those of the nearest folder that speaks of any."""
    for part in (name.name.removesuffix(name.suffix), *reversed(name.parts[:-1])):
        if (shard := _SHARD.fullmatch(part)) and shard["split"] != _SAVED:
            return {SPLIT_OF_WORD.get(shard["split"], shard["split"])}
        words = re.findall("[a-z]+", part.lower())
        if splits := {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}:
            return splits | {part}
    return set()


def _checked(path: Path) -> Path:
    if not suffix_of(path.name):
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES + MORE_SUFFIXES)}")
    return path


def _names_in(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return _names_of_rows(name.as_posix() for name in names)


def _names_of_rows(names: Iterable[str]) -> list[str]:
    rows = [name for name in names if _holds_rows(PurePosixPath(name))]
    return [name for name in rows if suffix_of(name) in SUFFIXES] or rows


def _holds_rows(name: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return suffix_of(name.name) != "" and name.name not in _NOT_ROWS and not hidden


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    named = all(re.fullmatch(r"\w[\w.+=-]*", part) for part in parts)
    return named and len(parts) > 1 and not suffix_of(parts[1])


def _from_hub(source: str, split: str) -> list[Path]:
    from huggingface_hub import hf_hub_download, list_repo_files  # here: local data needs no Hub client

    owner, name, *inside = source.split("/")
    repo = f"{owner}/{name}"
    names = _names_of_rows(_ask(list_repo_files, repo))
    chosen = _choose_on_hub(names, "/".join(inside), split, source)
    return [Path(_ask(hf_hub_download, repo, name)) for name in chosen]


def _ask(hub: Callable[..., Any], repo: str, *arguments: str) -> Any:
    try:
        return hub(repo, *arguments, repo_type="dataset")
    except Exception as error:  # of HTTP, of the connection, of the id: its kinds change with the client's versions
        raise ValueError(f"{repo} is no local file or folder, and the Hub did not give it: {error}") from error


def _choose_on_hub(names: list[str], inside: str, split: str, source: str) -> list[str]:
    if inside in names:
        return [inside]
    if inside:
        return choose_split([name for name in names if name.startswith(f"{inside}/")], split, source)
    chosen = choose_split(names, split, source)
    kinds = sorted({f"{PurePosixPath(name).parent}/*{PurePosixPath(name).suffix}" for name in chosen})
    if len(kinds) > 1:
        raise ValueError(
            f"{source} holds {', '.join(kinds)}: name one folder or file, as in {source}/{chosen[0]}, or a "
            f"configuration that the dataset describes, as in {source}:NAME"
        )
    return chosen
