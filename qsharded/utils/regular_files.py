"""Files from outside that are no files: a pipe or a device is read for ever."""

import stat
from pathlib import Path


def regular_size(path: Path) -> int:
    """The bytes of a file.

    Raises:
        ValueError: it is a folder, a pipe or a device.
        FileNotFoundError: it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file: a folder, a pipe or a device cannot be read as one")
    return status.st_size
