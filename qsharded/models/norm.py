"""The norms of a decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.config import ModelConfig


class OffsetRMSNorm(nn.RMSNorm):
    """x / rms(x) * (1 + weight), in fp32 at least: in bf16 the sum would lose most of a small weight. Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        precise = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return F.rms_norm(x.to(precise), self.normalized_shape, 1 + self.weight.to(precise), eps).to(x.dtype)


def rms_norm(config: ModelConfig, width: int, eps: float | None = None) -> nn.RMSNorm:
    """The model's norm, of vectors of ``width`` values; ``eps``: where it is not that of ``config``."""
    kind = OffsetRMSNorm if config.norm_offset else nn.RMSNorm
    return kind(width, eps=config.rms_norm_eps if eps is None else eps)
