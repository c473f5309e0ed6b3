"""Write a safetensors file part by part, so that no more than a part is in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qsharded.checkpoint.safetensors_header import Spec, adjoining, data_start, encode, entry, file_order, head, nbytes
from qsharded.utils.durable_files import Replacement


class SafetensorsFile:
    """A file whose tensors are known and whose bytes come in any order. It is complete when the context is left.

    Args:
        path: to write.
        tensors: dtype and shape of each.
        late: names of uint8 tensors whose size is not known yet; each is given whole to :meth:`append`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec], late: Iterable[str] = ()) -> None:
        self._entries = adjoining((name, tensors[name]) for name in file_order(tensors))
        self._end = sum(map(nbytes, tensors.values()))
        # room for the header as it will be: an offset has at most 19 digits
        room = {name: entry((torch.uint8, (10**18,)), 10**18) for name in late}
        self._header_size = len(encode(self._entries | room))
        self._file = Replacement(path)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._file.__exit__(kind, error, at)
            return
        with self._file:
            self._file.truncate(data_start(self._header_size) + self._end)
            self._file.seek(0)
            self._file.write(head(encode(self._entries), self._header_size))

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
        self._file.seek(data_start(self._header_size) + begin + first)
        self._file.write(raw.numpy().data)

    def append(self, name: str, whole: Tensor) -> None:
        """Add one of the late tensors."""
        spec = whole.dtype, tuple(whole.shape)
        self._entries[name] = entry(spec, self._end)
        self._end += nbytes(spec)
        self.write(name, whole)
