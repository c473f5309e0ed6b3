"""Where an adapter began, if that was a change already: kept beside it, for what is added to other weights than the
rounded ones that it began on is the trained update less the initial one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qsharded.checkpoint.adapter import WEIGHTS_FILE, open_weights
from qsharded.checkpoint.files import FileRecord, TensorParts, read_record, write_tensors
from qsharded.utils.durable_files import copy_whole

INITIAL_FILE = "initial_adapter.safetensors"
INITIAL_KEY = "qsharded_initial"  # in the metadata of an adapter's safetensors file, where PEFT leaves it alone


def write_initial(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the file into ``folder``, ``tensors`` by their names in an adapter file; returns its SHA-256."""
    parts = {name: TensorParts(tensor.dtype, tuple(tensor.shape), [tensor]) for name, tensor in tensors.items()}
    return write_tensors(folder / INITIAL_FILE, parts, {"format": "pt"}).sha256


def copy_initial(source: Path, folder: Path, initial: str) -> dict[str, FileRecord]:
    """Put the file of ``source``, a folder, beside the adapter in ``folder``, where the adapter has one: ``initial``,
    its SHA-256, is not "". Returns its record by its name."""
    if not initial:
        return {}
    if source != folder:
        copy_whole(source / INITIAL_FILE, folder / INITIAL_FILE)
    return {INITIAL_FILE: read_record(folder / INITIAL_FILE)}


def initial_metadata(initial: str) -> dict[str, str]:
    """What an adapter's safetensors file says of it."""
    return {INITIAL_KEY: initial} if initial else {}


def initial_of(adapter: Path) -> str:
    """The SHA-256 of the file that belongs to the adapter in a folder; "" where it began at no change.

    Raises:
        ValueError: the adapter's file is damaged.
    """
    path = adapter / WEIGHTS_FILE
    with open_weights(path) as file:
        return str((file.metadata() or {}).get(INITIAL_KEY, ""))


def open_initial(adapter: Path) -> Any:
    """Its safetensors file, open; None where the adapter began at no change.

    Raises:
        ValueError: the file is missing, or is another.
    """
    initial = initial_of(adapter)
    if not initial:
        return None
    path = adapter / INITIAL_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the adapter did not begin at no change, and what it began with has to be taken off; "
            "copy the file from where the adapter was trained"
        )
    if read_record(path).sha256 != initial:
        raise ValueError(f"{path} is damaged, or of another adapter: its SHA-256 is not the one in {WEIGHTS_FILE}")
    return open_weights(path)
