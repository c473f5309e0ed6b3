"""A folder that a command writes: free before, complete or absent after."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qsharded.utils.durable_files import copy_whole, sync_folder
from qsharded.utils.signals import unwinding


def refuse_occupied(output: Path) -> None:
    """Raise ValueError unless ``output`` (``--output``) is free: nothing is there, or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder; choose another or remove it")


@contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its name at the end, and is removed if the end is not reached."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with unwinding():  # a signal must not leave the folder either
        unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            unfinished.chmod(0o777 & ~_umask())  # mkdtemp's is the owner's alone
            yield unfinished
            unfinished.replace(output)
            sync_folder(output.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def copy_files(files: Iterable[Path], folder: Path, target: Path) -> None:
    """Copy those of ``files``, which lie in ``folder``, that exist; sub-folders stay."""
    for file in files:
        if file.is_file():
            copy_whole(file, target / file.relative_to(folder))
