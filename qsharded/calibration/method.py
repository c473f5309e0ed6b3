"""How the weights of a calibration are rounded."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from qsharded.quant.formats import QuantFormat

Method = Literal["compensated", "search"]


@dataclass(frozen=True)
class Calibration:
    """How weights are rounded.

    Attributes:
        method: "compensated", or "search" of scales alone.
        quant_format: to which format.
        group: the ranks that do it together: each takes some of the calibration rows, some rows of every linear weight,
            and some of a layer's experts.
    """

    method: Method
    quant_format: QuantFormat
    group: dist.ProcessGroup | None = None
