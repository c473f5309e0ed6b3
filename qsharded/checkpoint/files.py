"""Files that are on the disk when the function that wrote them returns, hashed on the way."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsharded.checkpoint.safetensors_header import Spec, adjoining, encode, file_order, head, nbytes
from qsharded.utils import heartbeat
from qsharded.utils.durable_files import Replacement

_CHUNK = 1 << 22  # bytes read at once: enough to keep a disk busy, small beside what a rank holds


@dataclass(frozen=True)
class FileRecord:
    """What a file holds: its size in bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorParts:
    """A tensor to be written: CPU tensors that hold its elements, one after the other; each is taken in its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tensors: Iterable[Tensor]

    @property
    def spec(self) -> Spec:
        """What the header says of it."""
        return self.dtype, self.shape


def write_bytes(path: Path, parts: Iterable[Any], nbytes: int | None = None) -> FileRecord:
    """Write ``parts``, which are buffers of bytes, ``nbytes`` in all, to ``path``.

    Raises:
        NotWritten: it could not be; what was there before still is.
    """
    digest, size = hashlib.sha256(), 0
    with Replacement(path, nbytes) as file:
        for part in parts:
            size += file.write(part)
            digest.update(part)
    return FileRecord(size, digest.hexdigest())


def write_json(path: Path, value: Mapping[str, Any]) -> FileRecord:
    """Write ``value`` to ``path`` as a JSON object."""
    text = (json.dumps(value, indent=2) + "\n").encode()
    return write_bytes(path, [text], len(text))


def write_tensors(path: Path, tensors: Mapping[str, TensorParts], metadata: Mapping[str, str]) -> FileRecord:
    """Write a safetensors file to ``path``; no more than one part needs to be in memory."""
    specs = {name: parts.spec for name, parts in tensors.items()}
    order = file_order(specs)
    start = head(encode(adjoining((name, specs[name]) for name in order), metadata))
    size = len(start) + sum(map(nbytes, specs.values()))
    values = (_bytes_of(tensor) for name in order for tensor in tensors[name].tensors)
    record = write_bytes(path, chain([start], values), size)
    assert record.size == size, f"{path}: parts of other shapes"
    return record


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def read_record(path: Path) -> FileRecord:
    """The record of a file as it is now, by reading all of it."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            heartbeat.beat("reading a checkpoint's files")
            yield chunk
