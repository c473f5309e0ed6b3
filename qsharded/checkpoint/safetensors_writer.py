"""Write a safetensors file part by part, so that no more than a part is in memory."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qsharded.checkpoint.files import SAFETENSORS_NAME
from qsharded.utils.durable_files import Replacement

Spec = tuple[torch.dtype, tuple[int, ...]]


class SafetensorsFile:
    """A file whose tensors are known and whose bytes come in any order. It is complete when the context is left.

    Args:
        path: to write.
        tensors: dtype and shape of each.
        late: names of uint8 tensors whose size is not known yet; each is given whole to :meth:`append`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec], late: Iterable[str] = ()) -> None:
        order = sorted(tensors, key=lambda name: (list(SAFETENSORS_NAME).index(tensors[name][0]), name))
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0
        for name in order:
            self._place(name, *tensors[name])
        # room for the header as it will be: an offset has at most 19 digits
        room = {name: _entry(torch.uint8, (10**18,), 10**18, 10**18) for name in late}
        self._header_size = len(_header(self._entries | room))
        self._file = Replacement(path)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._file.__exit__(kind, error, at)
            return
        with self._file:
            self._file.truncate(8 + self._header_size + self._end)
            self._file.seek(0)
            header = _header(self._entries).ljust(self._header_size)
            self._file.write(self._header_size.to_bytes(8, "little") + header)

    @property
    def nbytes(self) -> int:
        """Of all tensors so far."""
        return self._end

    def names(self) -> list[str]:
        """Of all tensors so far."""
        return list(self._entries)

    def write(self, name: str, part: Tensor, first: int = 0) -> None:
        """Put the bytes of ``part`` into the tensor, from its byte ``first`` on."""
        begin, end = self._entries[name]["data_offsets"]
        raw = part.cpu().contiguous().flatten().view(torch.uint8)
        assert begin + first + raw.numel() <= end, (name, first, raw.numel())
        self._file.seek(8 + self._header_size + begin + first)
        self._file.write(raw.numpy().data)

    def append(self, name: str, whole: Tensor) -> None:
        """Add one of the late tensors."""
        self._place(name, whole.dtype, tuple(whole.shape))
        self.write(name, whole)

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        begin, self._end = self._end, self._end + math.prod(shape) * dtype.itemsize
        self._entries[name] = _entry(dtype, shape, begin, self._end)


def _entry(dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": SAFETENSORS_NAME[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def _header(entries: Mapping[str, Any]) -> bytes:
    """In whole words of 8 bytes, as the format wants it."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def data_bytes(header: bytes) -> int:
    """What the tensors take that a file's header lists."""
    entries = json.loads(header)
    return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)


def extended_header(header: bytes, copies: Mapping[str, str]) -> bytes:
    """The header of a file with tensors added behind its last: a new name each, and one of the file's of the same kind.
    As it is where there are none."""
    if not copies:
        return header
    entries, end = json.loads(header), data_bytes(header)
    for name, like in copies.items():
        begin, stop = entries[like]["data_offsets"]
        entries[name] = entries[like] | {"data_offsets": [end, end + stop - begin]}
        end += stop - begin
    return _header(entries)
