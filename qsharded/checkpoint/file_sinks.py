"""Where a weight that is quantized goes in a file, in our form and in bitsandbytes'.

Axes: N = out_features, K = in_features, P = K/2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.checkpoint import packed_format
from qsharded.checkpoint.safetensors_writer import SafetensorsFile
from qsharded.quant import blockwise8, formats
from qsharded.quant.formats import QuantFormat
from qsharded.quant.packed_weight import QuantizedAbsmax


@dataclass(frozen=True)
class FileSink:
    """A packed weight with rows of ``K``, or several of one shape below each other, in our form."""

    file: SafetensorsFile
    name: str
    K: int

    def put_codes(self, first: int, codes_NP: Tensor) -> None:
        """As :class:`qsharded.checkpoint.fill_shards.PackedSink` says."""
        self.file.write(self.name, codes_NP, first * self.K // 2)

    def put_absmax(self, absmax: QuantizedAbsmax) -> None:
        """As :class:`qsharded.checkpoint.fill_shards.PackedSink` says."""
        self.file.write(self.name + packed_format.ABSMAX, absmax.codes)
        self.file.write(self.name + packed_format.SCALES, absmax.scales)
        self.file.write(self.name + packed_format.OFFSET, absmax.offset)


@dataclass(frozen=True)
class BitsandbytesSink(FileSink):
    """A packed weight [N, K], which was of ``dtype`` before, in bitsandbytes' form."""

    N: int
    quant_format: QuantFormat
    dtype: torch.dtype

    def put_absmax(self, absmax: QuantizedAbsmax) -> None:
        """As :class:`qsharded.checkpoint.fill_shards.PackedSink` says."""
        parts = {
            packed_format.BNB_ABSMAX: absmax.codes,
            packed_format.BNB_NESTED: absmax.scales,
            packed_format.BNB_MAP: formats.codebook(quant_type=self.quant_format.quant_type),
            packed_format.BNB_NESTED_MAP: blockwise8.dynamic_map(),
        }
        for ending, part in parts.items():
            self.file.write(self.name + ending, part)
        state = packed_format.bitsandbytes_state(self.quant_format, self.N, self.K, self.dtype, absmax.offset.item())
        self.file.append(self.name + packed_format.BNB_STATE + self.quant_format.quant_type, state)
