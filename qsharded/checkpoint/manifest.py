"""A training checkpoint's manifest: its files with their sizes and SHA-256, so that damage is found before use."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsharded import __version__
from qsharded.checkpoint.files import FileRecord, read_record, write_json
from qsharded.checkpoint.source import read_json

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_VERSION = "qsharded-checkpoint", 1


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, or whose bytes are not the ones written; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        world_size: ranks that wrote it.
        files: by their path in the folder, with "/".
        qsharded_version: that wrote it.
    """

    step: int
    world_size: int
    files: dict[str, FileRecord]
    qsharded_version: str = __version__


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; the last file of a checkpoint."""
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; its files are not looked at.

    Raises:
        DamagedCheckpoint: no manifest, or one that is not as written.
        ValueError: a layout of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing: the checkpoint was not written to its end")
    read = _read(path)
    version = read.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version!r}, qsharded {__version__} reads {FORMAT_VERSION}")
    try:
        files = {name: FileRecord(**record) for name, record in read.pop("files").items()}
        return Manifest(files=files, **read)
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        read = read_json(path)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from None
    if read.pop("format", None) != FORMAT:
        raise DamagedCheckpoint(f"{path} is damaged: its format is not {FORMAT}")
    return read


def verify(folder: Path) -> Manifest:
    """Read every file of a checkpoint and hold it against the manifest, which is returned.

    Raises:
        DamagedCheckpoint: a file that is missing, of another size, or of other bytes; the first one is named.
        ValueError: a layout of another version.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        _verify_size(folder / name, record)  # cheap, so all of them before any file is read
    for name, record in manifest.files.items():
        if read_record(folder / name) != record:
            raise DamagedCheckpoint(f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST_FILE}")
    return manifest


def _verify_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing")
    if path.stat().st_size != record.size:
        raise DamagedCheckpoint(f"{path} has {path.stat().st_size} bytes, {MANIFEST_FILE} says {record.size}")
