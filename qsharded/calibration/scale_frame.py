"""The second level of double quantization, fixed before codes are chosen, so that a scale is known as it will be read.

Axes: N = this rank's rows, G = blocks in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qsharded.quant import blockwise8
from qsharded.quant.formats import second_level_block
from qsharded.quant.pack_weight import SharedRows, second_level


@dataclass(frozen=True)
class ScaleFrame:
    """Which scales the blocks of a weight can have.

    Attributes:
        scales: fp32 [ceil(N*G/256)] of the whole weight, the second level's.
        offset: fp32 [], likewise.
        own_NG: fp32, the second-level scale of each block of these rows.
    """

    scales: Tensor
    offset: Tensor
    own_NG: Tensor

    @classmethod
    def of(cls, wanted_NG: Tensor, rows: SharedRows) -> "ScaleFrame":
        """The one that double quantization makes of scales ``wanted_NG``, of either sign. All ranks call this."""
        scales, offset = second_level(wanted_NG, rows)
        return cls(scales, offset, scales[second_level_block(wanted_NG, rows.start)])

    def encode(self, wanted: Tensor, own: Tensor) -> Tensor:
        """uint8, the nearest to ``wanted`` under ``own``, the blocks' part of ``own_NG``; shapes broadcast."""
        return blockwise8.nearest_codes(wanted - self.offset, own)

    def decode(self, codes: Tensor, own: Tensor) -> Tensor:
        """fp32, to the bit what every reader of the format makes of ``codes``."""
        return blockwise8.dequantize(codes, own) + self.offset

    def readable(self, own_M: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """From wanted scales of the blocks in a slice to those that are read in their place; ``own_M`` is of all."""
        return lambda wanted, part: self.decode(self.encode(wanted, own_M[part]), own_M[part])


def alone(rows: int) -> SharedRows:
    """All rows of a weight, in this process."""
    return SharedRows(0, rows, lambda tensor, op: None)
