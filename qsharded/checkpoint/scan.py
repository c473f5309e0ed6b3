"""One safetensors file from its first byte to its last: header, SHA-256, and values that are not finite.

It is read once, a few megabytes at a time. The header is parsed here and not by the safetensors package, so that a file
of which the end is missing still tells what it should hold.
"""

import hashlib
import math
import warnings
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qsharded.checkpoint import safetensors_header
from qsharded.checkpoint.files import read_record

_CHUNK = 1 << 24  # bytes, a multiple of every element's size
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor: ``start`` and ``stop`` are bytes behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The tensors of a file in the order in which they lie there, and the bytes before them."""

    tensors: list[Stored]
    size: int


@dataclass
class Scan:
    """What a file held, and what was wrong with it; the first problem comes first."""

    size: int
    sha256: str
    tensors: list[Stored] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def scan_file(path: Path, packed: Container[str] = ()) -> Scan:
    """Read all of a safetensors file.

    Args:
        path: of the file.
        packed: names of tensors whose bytes are no numbers, whatever their dtype says.
    """
    try:
        header = read_header(path)
    except ValueError as error:
        record = read_record(path)
        return Scan(record.size, record.sha256, problems=[str(error)])
    scan = Scan(path.stat().st_size, "", header.tensors)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(header.size))
        for tensor in header.tensors:
            problem = _read_tensor(file, tensor, digest, is_number=tensor.name not in packed)
            if problem:
                scan.problems.append(f"{path.name}: {tensor.name} {problem}")
        surplus = _hash_rest(file, digest)
    if surplus:
        scan.problems.append(f"{path.name} has {surplus} bytes behind its last tensor")
    scan.sha256 = digest.hexdigest()
    return scan


def _hash_rest(file: BinaryIO, digest: Any) -> int:
    size = 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size


def _read_tensor(file: BinaryIO, tensor: Stored, digest: Any, *, is_number: bool) -> str:
    """Read and hash a tensor's bytes; returns what is wrong with it."""
    problem, done = "", 0
    while done < tensor.nbytes:
        chunk = file.read(min(_CHUNK, tensor.nbytes - done))
        if not chunk:
            return f"is cut off: {done} of its {tensor.nbytes} bytes are there"
        digest.update(chunk)
        if is_number and not problem:
            problem = _not_finite(chunk, tensor, done)
        done += len(chunk)
    return problem


def _not_finite(chunk: bytes, tensor: Stored, offset: int) -> str:
    dtype = _FLOATS.get(tensor.dtype)
    whole = 0 if dtype is None else len(chunk) - len(chunk) % dtype.itemsize  # less at the end of a cut file
    if dtype is None or not whole:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the buffer is read-only, and only read
        values = torch.frombuffer(memoryview(chunk)[:whole], dtype=dtype)
    bad = ~values.isfinite()
    if not bad.any():
        return ""
    first = int(bad.int().argmax())
    place = torch.unravel_index(torch.tensor(offset // dtype.itemsize + first), tensor.shape) if tensor.shape else ()
    return f"holds {values[first].item()} at {[int(i) for i in place]}"


def read_header(path: Path) -> Header:
    """What a safetensors file says that it holds.

    Raises:
        ValueError: no such header; the file is named, and the tensor where one is at fault.
    """
    header = safetensors_header.read(path)
    try:
        entries = safetensors_header.decode(header)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged: its header is no JSON object: {error}") from None
    tensors = sorted((_stored(path, *entry) for entry in entries.items()), key=lambda tensor: tensor.start)
    _check_adjoining(path, tensors)
    return Header(tensors, safetensors_header.data_start(len(header)))


def _stored(path: Path, name: str, entry: Any) -> Stored:
    try:
        start, stop = entry["data_offsets"]
        tensor = Stored(name, entry["dtype"], tuple(entry["shape"]), start, stop)
        fits = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype] == tensor.nbytes
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path.name} is damaged: its header says of {name} {entry!r:.100}") from None
    if not fits:
        raise ValueError(f"{path.name}: {name} is {tensor.dtype} {list(tensor.shape)} in {tensor.nbytes} bytes")
    return tensor


def _check_adjoining(path: Path, tensors: list[Stored]) -> None:
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(f"{path.name}: {tensor.name} begins at byte {tensor.start}, not at {end}")
        end = tensor.stop
