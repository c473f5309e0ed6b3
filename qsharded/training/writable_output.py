"""Whether a run can write its output, found out by writing, before anything is read."""

import os
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4


def refuse_unwritable(output_dir: Path, folders: Iterable[str], files: Iterable[str]) -> None:
    """Make ``output_dir`` and write a file into it and into those of ``folders`` that are there; nothing of it stays.

    Args:
        output_dir: of the run (``--output-dir``), which may have to be made.
        folders, files: what the run writes there, by name.

    Raises:
        ValueError: the folder cannot be made or written to, or a file is where a folder must be, or a folder where a
            file must be; the path is named.
    """
    made = missing_folders(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for folder in (output_dir, *(output_dir / name for name in folders)):
            if folder == output_dir or folder.exists():
                _probe(folder)
        for file in (output_dir / name for name in files):
            if file.is_dir():
                raise ValueError(f"--output-dir {output_dir}: {file} is a folder, the run writes a file of that name")
    except OSError as error:
        raise ValueError(
            f"--output-dir {output_dir} cannot be written to: {error.strerror or error} "
            f"({error.filename or output_dir}); choose another folder, or change its permissions"
        ) from None
    finally:
        remove_empty(made)


def _probe(folder: Path) -> None:
    path = folder / f".probe-{uuid4().hex}"
    try:
        with path.open("xb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)  # of a write, the system does not say where
        raise
    finally:
        if path.parent.is_dir():
            path.unlink(missing_ok=True)


def missing_folders(folder: Path) -> list[Path]:
    """The folders that are not there yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def remove_empty(folders: Iterable[Path]) -> None:
    """A run that is refused later leaves no folders behind."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
