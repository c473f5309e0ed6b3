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

from qsharded.utils.durable_files import Replacement

_CHUNK = 1 << 22  # bytes read at once: enough to keep a disk busy, small beside what a rank holds
# The format's names. In this order within a file, as safetensors writes it: wide ones first, so that all are aligned.
SAFETENSORS_NAME = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class FileRecord:
    """What a file holds: its size in bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Parts:
    """A tensor to be written: CPU tensors that hold its elements, one after the other; each is taken in its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tensors: Iterable[Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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


def write_tensors(path: Path, tensors: Mapping[str, Parts], metadata: Mapping[str, str]) -> FileRecord:
    """Write a safetensors file to ``path``; no more than one part needs to be in memory."""
    # The widest types first: readers map the file into memory, where each tensor must be aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    head = _safetensors_head(ordered, metadata)
    nbytes = len(head) + sum(parts.size for parts in ordered.values())
    values = (_bytes_of(tensor) for parts in ordered.values() for tensor in parts.tensors)
    record = write_bytes(path, chain([head], values), nbytes)
    assert record.size == nbytes, f"{path}: parts of other shapes"
    return record


def _safetensors_head(tensors: Mapping[str, Parts], metadata: Mapping[str, str]) -> bytes:
    """The header's length in 8 bytes and the header, filled with spaces up to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, parts in tensors.items():
        offsets = [end, end + parts.size]
        header[name] = {"dtype": SAFETENSORS_NAME[parts.dtype], "shape": parts.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
            yield chunk
