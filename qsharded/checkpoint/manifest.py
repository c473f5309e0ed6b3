"""A training checkpoint's manifest: its files with their sizes and SHA-256, so that damage is found before use.

It carries a hash of itself too: of its own bytes, with zeros where the hash stands. Format version 1 had none; such
checkpoints are read, and what theirs says is held against the other files alone.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qsharded import __version__
from qsharded.checkpoint.files import FileRecord, read_record
from qsharded.utils.durable_files import write_whole

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_VERSION = "qsharded-checkpoint", 2
_WITHOUT_HASH = 1
_HASH, _NO_HASH = "manifest_sha256", "0" * 64
_SHA256 = re.compile("[0-9a-f]{64}")


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
    said = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(manifest) | {_HASH: _NO_HASH}
    text = json.dumps(said, indent=2) + "\n"
    write_whole(folder / MANIFEST_FILE, text.replace(_NO_HASH, _sha256(text.encode())).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; its files are not looked at.

    Raises:
        DamagedCheckpoint: no manifest, or one that is not as written.
        ValueError: a layout of another version.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing: the checkpoint was not written to its end")
    raw = path.read_bytes()
    said = _parsed(raw, path)
    version = said.pop("format_version", None)
    if version not in (_WITHOUT_HASH, FORMAT_VERSION) or isinstance(version, bool):
        raise ValueError(
            f"{path} has format_version {version!r}, qsharded {__version__} reads {_WITHOUT_HASH} and {FORMAT_VERSION}"
        )
    if version != _WITHOUT_HASH:
        _check_own_hash(raw, said.pop(_HASH, None), path)
    return _manifest(said, path)


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not valid JSON: {error}") from None
    if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
        raise DamagedCheckpoint(f"{path} is damaged: its format is not {FORMAT}")
    return said


def _check_own_hash(raw: bytes, recorded: Any, path: Path) -> None:
    """Over the bytes, not over what they mean: so no change of any of them goes unseen."""
    is_hash = isinstance(recorded, str) and _SHA256.fullmatch(recorded)
    if not is_hash or _sha256(raw.replace(recorded.encode(), _NO_HASH.encode(), 1)) != recorded:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 is not the one that it carries")


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _manifest(said: dict[str, Any], path: Path) -> Manifest:
    """Of the right types throughout: what is not is damage, as no version wrote it."""
    try:
        files = {name: FileRecord(**record) for name, record in said.pop("files").items()}
        manifest = Manifest(files=files, **said)
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from None
    counts = {"step": manifest.step, "world_size": manifest.world_size}
    counts |= {f"the size of {name}": record.size for name, record in files.items()}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise DamagedCheckpoint(f"{path} is damaged: {name} is {count!r}")
    for name, record in files.items():
        if not _is_inside(name) or not isinstance(record.sha256, str):
            raise DamagedCheckpoint(f"{path} is damaged: it lists {name!r} with SHA-256 {record.sha256!r}")
    return manifest


def _is_inside(name: str) -> bool:
    """Whether the path stays in its folder."""
    return bool(name) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def verify(folder: Path) -> Manifest:
    """Read every file of a checkpoint and hold it against the manifest, which is returned.

    Raises:
        DamagedCheckpoint: a file that is missing, of another size, or of other bytes; the first one is named.
        ValueError: a layout of another version.
        OSError: a file cannot be read.
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
