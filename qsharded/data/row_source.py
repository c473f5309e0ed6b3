"""Where a dataset's rows come from, as the cache needs it: what they are told by, and the rows in chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsharded.data.chunks import Chunk, chunks, chunks_of
from qsharded.data.content import content_hashes
from qsharded.data.sources import configuration_of, find_files, is_on_hub, suffix_of
from qsharded.data.through_datasets import configured_rows


@dataclass(frozen=True)
class Files:
    """Files that are read whole; of those that hold several splits, one."""

    paths: Sequence[Path]
    split: str = "train"

    @property
    def nbytes(self) -> int:
        """What they take on the disk."""
        return sum(path.stat().st_size for path in self.paths)

    def identity(self, memory: Path) -> list[Any]:
        """Values of JSON that are others where the rows are; see ``content_hashes`` for ``memory``."""
        hashes = content_hashes(self.paths, memory)
        return [self.split, *((suffix_of(path.name), found) for path, found in zip(self.paths, hashes, strict=True))]

    def chunks(self) -> Iterator[Chunk]:
        """The rows, in order."""
        return chunks(self.paths, self.split)


@dataclass(frozen=True)
class Configured:
    """A split of a configuration of a dataset, on the Hub or in a folder; without a name, of the only one."""

    name: str
    configuration: str | None
    split: str
    nbytes: int = 0  # unknown

    def identity(self, memory: Path) -> list[Any]:
        """As that of files: the commit on the Hub, or the content of the folder."""
        return [self.configuration, self.split, self._content(memory)]

    def _content(self, memory: Path) -> Any:
        folder = Path(self.name)
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            hashes = content_hashes(files, memory)
            return [(str(path.relative_to(folder)), found) for path, found in zip(files, hashes, strict=True)]
        from huggingface_hub import HfApi  # here: local data needs no Hub client

        try:
            return HfApi().dataset_info(self.name).sha
        except Exception as error:  # of HTTP, of the connection, of the id
            raise ValueError(f"{self.name} is no local folder, and the Hub did not give it: {error}") from error

    def chunks(self) -> Iterator[Chunk]:
        """The rows, in order."""
        return chunks_of(configured_rows(self.name, self.configuration, self.split))


RowSource = Files | Configured


def row_source(source: str, split: str, *, streaming: bool = False) -> RowSource:
    """What ``source``, as the user names it, stands for; with ``streaming`` nothing is downloaded from the Hub.

    Raises:
        ValueError: as :func:`qsharded.data.sources.find_files`.
    """
    named = configuration_of(source)
    if named is None and streaming and is_on_hub(source):
        return Configured(source, None, split)
    return Files(find_files(source, split), split) if named is None else Configured(*named, split)


def files_of(source: str, split: str, *, streaming: bool = False) -> Sequence[Path]:
    """The files of ``source`` on this machine, those of the Hub downloaded; none of a configuration or a stream.

    Raises:
        ValueError: as :func:`row_source`.
    """
    found = row_source(source, split, streaming=streaming)
    return found.paths if isinstance(found, Files) else []
