"""The experts of a checkpoint in 16 bits, packed into a file: from whatever layout into our own.

Axes: E experts, N = out_features, K = in_features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qsharded.checkpoint import fill_shards, packed_format
from qsharded.checkpoint.expert_fills import ExpertPacking, RowsOfExperts
from qsharded.checkpoint.expert_layouts import layout_of
from qsharded.checkpoint.file_sinks import FileSink
from qsharded.checkpoint.safetensors_header import Spec
from qsharded.checkpoint.safetensors_writer import SafetensorsFile
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant.experts import PackedExperts
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

    def sink(self, name: str, file: SafetensorsFile) -> FileSink:
        """Where they go."""
        return FileSink(file, name, self.layer.in_features)

    def fill(self, name: str, file: SafetensorsFile) -> fill_shards.Fill:
        """What writes them."""
        E, N, K = self.layer.experts, self.layer.out_features, self.layer.in_features
        packing = ExpertPacking(E, K, RowRange(0, E * N, E * N, None), self.layer.quant_format, self.sink(name, file))
        fill = RowsOfExperts(self.source, self.name, N, K, packing)
        fill.chunks = [replace(chunk, name=self.in_files(chunk.name)) for chunk in fill.chunks]
        return fill
