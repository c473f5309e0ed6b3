"""The experts of a checkpoint in 16 bits, packed into a file: from whatever layout into our own.

Axes: E experts, N = out_features, K = in_features, P = K/2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from qsharded.checkpoint import fill_shards, packed_format
from qsharded.checkpoint.expert_fills import ExpertPacking, RowsOfExperts
from qsharded.checkpoint.expert_layouts import layout_of
from qsharded.checkpoint.safetensors_header import Spec
from qsharded.checkpoint.safetensors_writer import SafetensorsFile
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant.experts import PackedExperts
from qsharded.quant.packed_weight import QuantizedAbsmax
from qsharded.utils.sharding import RowRange


@dataclass(frozen=True)
class ExpertsToPack:
    """One projection of all experts of a layer.

    Attributes:
        source: the checkpoint's files.
        name: of its weight in the model.
        layer: on the meta device: its sizes.
        in_files: from the name of a tensor of ``source`` to what the files call it.
    """

    source: SafetensorsFolder
    name: str
    layer: PackedExperts
    in_files: Callable[[str], str]

    @property
    def stored(self) -> str:
        """A tensor of the files that holds some of it."""
        return self.in_files(next(iter(self._shapes())))

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        layout, layer = layout_of(self.source, self.name), self.layer
        sizes = layer.out_features, layer.in_features
        units = layout.units(self.source, 0, 0, sizes[0], *sizes)
        return layer.experts * sum(chunk.nbytes for unit in units for chunk in unit.chunks)

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        layer = self.layer
        return layout_of(self.source, self.name).shapes(layer.out_features, layer.in_features, layer.experts)

    def specs(self, name: str) -> Mapping[str, Spec | None]:
        """The tensors to write under ``name``."""
        sizes = self.layer.experts, self.layer.out_features, self.layer.in_features
        return packed_format.packed_expert_specs(self.layer.quant_format, name, *sizes)

    def fill(self, name: str, file: SafetensorsFile) -> fill_shards.Fill:
        """What writes them."""
        sink = _IntoFile(file, name, self.layer)
        fill = RowsOfExperts(self.source, self.name, self.layer.out_features, self.layer.in_features, sink)
        fill.chunks = [replace(chunk, name=self.in_files(chunk.name)) for chunk in fill.chunks]
        return fill


class _IntoFile(ExpertPacking):
    def __init__(self, file: SafetensorsFile, name: str, layer: PackedExperts) -> None:
        rows = layer.experts * layer.out_features
        super().__init__(layer.experts, layer.in_features, RowRange(0, rows, rows, None), layer.quant_format)
        self._file, self._name, self._P = file, name, layer.in_features // 2

    def put_codes(self, first: int, codes_nP: Tensor) -> None:
        self._file.write(self._name, codes_nP, first * self._P)

    def put_absmax(self, absmax: QuantizedAbsmax) -> None:
        self._file.write(self._name + packed_format.ABSMAX, absmax.codes)
        self._file.write(self._name + packed_format.SCALES, absmax.scales)
        self._file.write(self._name + packed_format.OFFSET, absmax.offset)
