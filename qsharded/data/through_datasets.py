"""Rows that the `datasets` package reads: other types of files, and datasets with configurations.

They are read as a stream, once: what becomes of them is in the cache of tokenized datasets, so no copy is prepared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsharded.data.nulls import without_nulls
from qsharded.data.sources import suffix_of

Rows = Iterator[tuple[str, dict[str, Any]]]

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t"}),
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "arrow": ("arrow", {}),
}


def file_rows(path: Path) -> Rows:
    """The rows of a file, each with ``file:row``, from 1.

    Raises:
        ValueError: `datasets` is not installed, or cannot read the file.
    """
    builder, options = _BUILDERS[suffix_of(path.name).split(".")[1]]
    yield from _rows(str(path), builder, data_files=[str(path)], split="train", **options)


def configured_rows(name: str, configuration: str | None, split: str) -> Rows:
    """The rows of a split of a configuration of a dataset on the Hub, or in a folder that describes its own.

    Raises:
        ValueError: there is none, or it cannot be read; what there is is said.
    """
    yield from _rows(f"{name}:{configuration or 'default'}", name, configuration, split=split)


def _rows(origin: str, *which: str | None, **options: Any) -> Rows:
    with _errors_named(origin):
        from datasets import load_dataset  # an extra, which takes seconds

        for number, row in enumerate(load_dataset(*which, streaming=True, **options), 1):
            yield f"{origin}:{number}", without_nulls(row)


@contextmanager
def _errors_named(origin: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"reading {origin} needs datasets: pip install 'qsharded[datasets]' ({error})") from None
    except GeneratorExit:
        raise
    except Exception as error:  # of files, of the Hub, of its builders: kinds of their own
        hint = "; pip install zstandard" if "zstd" in str(error) else ""
        raise ValueError(f"{origin}: datasets cannot read it: {error}{hint}") from error
