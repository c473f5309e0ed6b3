"""The header of a safetensors file: read and written here alone.

A file begins with the header's length, 8 bytes, little-endian; then the header, a JSON object with an entry for each
tensor: its dtype, shape, and where its bytes lie behind the header. Source: the format's description,
https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qsharded.utils.regular_files import regular_size
from qsharded.utils.untrusted_json import (
    Kind,
    as_object,
    check,
    integer,
    list_of,
    map_of,
    parse,
    require,
    shown,
    text,
)

_LENGTH_BYTES = 8
_LONGEST = 100_000_000  # the format's own limit
_METADATA = "__metadata__"
_MOST_TENSORS = 200_000  # the largest models of experts have 100,000, over hundreds of files
_ENTRY = {
    "dtype": text(16),
    "shape": list_of(integer(0, 1 << 48), 16),
    "data_offsets": Kind("two byte offsets", lambda v: list_of(integer(0, 1 << 60), 2).holds(v) and len(v) == 2),
}
# In the order of a file, as the safetensors package writes it: wide ones first, since readers map files into memory.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Spec = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and shape of a tensor."""


def file_order(tensors: Mapping[str, Spec]) -> list[str]:
    """Names in the order to write them in."""
    return sorted(tensors, key=lambda name: (list(_NAMES).index(tensors[name][0]), name))


def nbytes(spec: Spec) -> int:
    """What a tensor takes."""
    dtype, shape = spec
    return torch.Size(shape).numel() * dtype.itemsize


def entry(spec: Spec, begin: int) -> dict[str, Any]:
    """The header's entry of a tensor whose bytes begin so far behind the header."""
    dtype, shape = spec
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + nbytes(spec)]}


def adjoining(tensors: Iterable[tuple[str, Spec]]) -> dict[str, dict[str, Any]]:
    """Entries of tensors that lie one behind the other."""
    entries, end = {}, 0
    for name, spec in tensors:
        entries[name] = entry(spec, end)
        end += nbytes(spec)
    return entries


def encode(entries: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header, in whole words of 8 bytes, as the format wants it; its length is not in it yet."""
    header = {_METADATA: {"format": "pt"} if metadata is None else dict(metadata), **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def head(header: bytes, size: int | None = None) -> bytes:
    """What a file begins with: the length, and the header, filled with spaces up to ``size`` bytes."""
    padded = header.ljust(size or 0)
    return len(padded).to_bytes(_LENGTH_BYTES, "little") + padded


def data_start(header_size: int) -> int:
    """The byte of the file at which the first tensor lies."""
    return _LENGTH_BYTES + header_size


def read(path: Path) -> bytes:
    """The header of a file, undecoded.

    Raises:
        ValueError: there is none, or less of it than the file says, or it is no regular file.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(size - _LENGTH_BYTES, _LONGEST):
            raise ValueError(f"{path.name} is no safetensors file or cut off: {length} bytes of header in {size}")
        return file.read(length)


def decode(header: bytes) -> dict[str, Any]:
    """Each tensor's entry, in the header's order.

    Raises:
        ValueError, TypeError: it is no JSON object.
    """
    entries = dict(json.loads(header))
    entries.pop(_METADATA, None)
    return entries


def read_checked(path: Path) -> tuple[int, dict[str, Any]]:
    """The header's size, and each tensor's entry, of a file from outside.

    Raises:
        ValueError: the header is not what the format allows, or lists more tensors than a model's file has; the
            file and the tensor are named.
    """
    regular_size(path)  # what it raises names the file already
    try:
        header = read(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    return len(header), _checked(header, path)


def _checked(header: bytes, path: Path) -> dict[str, Any]:
    listed = header.count(b"data_offsets")
    if listed > _MOST_TENSORS:  # before it is decoded: half a gigabyte of Python's objects
        raise ValueError(f"{path} lists {listed:,} tensors, more than {_MOST_TENSORS:,}")
    entries = as_object(parse(header, str(path), longest=_LONGEST), f"{path}: the header")
    check(entries, {_METADATA: map_of(text(_LONGEST), _MOST_TENSORS)}, str(path))
    entries.pop(_METADATA, None)
    for name, described in entries.items():
        origin = f"{path}: {shown(name)}"
        require(as_object(described, origin), _ENTRY, origin)
    return entries


def data_bytes(header: bytes) -> int:
    """What the tensors take that a file's header lists."""
    return max((listed["data_offsets"][1] for listed in decode(header).values()), default=0)


def extended(header: bytes, copies: Mapping[str, str]) -> bytes:
    """The header of a file with tensors added behind its last: a new name each, and one of the file's of the same kind.
    As it is where there are none."""
    if not copies:
        return header
    entries, end = json.loads(header), data_bytes(header)
    for name, like in copies.items():
        begin, stop = entries[like]["data_offsets"]
        entries[name] = entries[like] | {"data_offsets": [end, end + stop - begin]}
        end += stop - begin
    return encode(entries, entries.pop(_METADATA, None))
