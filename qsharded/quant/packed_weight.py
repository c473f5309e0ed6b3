"""A weight in 4 bits as one value, and the bf16 rows in which a layer keeps it.

Axes: N = out_features, K = in_features, P = K/2 code bytes, B = block_size, G = K/B blocks in a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsharded.quant import formats
from qsharded.quant.formats import QuantFormat


class QuantizedAbsmax(NamedTuple):
    """Absmax after double quantization, of a whole weight or of the rows of one rank.

    Attributes:
        codes: uint8 [N, G].
        scales: fp32 [ceil(N*G/256)] of the whole weight.
        offset: fp32 [], of the whole weight.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight [N, K] as it is stored, sharded, and given to operations and kernels: what all of the stack
    passes. (:class:`qsharded.nf4.NF4Weight` is for those who look into the numbers.)

    Attributes:
        codes: uint8 [N, P].
        absmax: uint8 codes [N, G] with double quantization; without it [N, G] as the format's scale encoding stores it,
            fp32 for NF4. Its rows may be strided.
        absmax_scales: fp32 [ceil(N*G/256)] of the whole weight; None without double quantization.
        absmax_offset: fp32 [], likewise.
        quant_format: what it was quantized to.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scales: Tensor | None
    absmax_offset: Tensor | None
    quant_format: QuantFormat  # without a default: torch.compile of torch 2.11 takes no object as one

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Flat, as kernels and ``torch.ops.qsharded`` take them."""
        return self.codes, self.absmax, self.absmax_scales, self.absmax_offset

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def decoded_absmax(self) -> Tensor:
        """fp32 [N, G]: each block's scale as dequantizing uses it, in plain PyTorch."""
        if self.absmax_scales is not None and self.absmax_offset is not None:
            return formats.dequantize_absmax(self.absmax, self.absmax_scales, self.absmax_offset)
        return self.quant_format.scale_encoding.decode(self.absmax)

    def stored_rows(self) -> tuple[Tensor, Tensor]:
        """Codes and absmax as bf16 rows, [N, K/4] and [N, ceil(G/2)] or [N, 2G]: the same bytes, padded where G is odd.

        Raises:
            RuntimeError: the tensors are not contiguous.
        """
        absmax = pad_absmax(self.absmax) if self.absmax.dtype == torch.uint8 else self.absmax
        return self.codes.view(torch.bfloat16), absmax.view(torch.bfloat16)

    @classmethod
    def from_stored_rows(
        cls,
        codes: Tensor,
        absmax: Tensor,
        absmax_scales: Tensor | None,
        absmax_offset: Tensor | None,
        quant_format: QuantFormat,
    ) -> "PackedWeight":
        """Of such rows: views, nothing is copied."""
        codes = codes.view(torch.uint8)
        dtype, G = torch.uint8, codes.shape[1] * 2 // quant_format.block_size
        if absmax_scales is None:
            dtype = quant_format.scale_encoding.dtype
        absmax = absmax.view(dtype)
        if dtype == torch.uint8 and G % 2:
            absmax = absmax[:, :G]
        return cls(codes, absmax, absmax_scales, absmax_offset, quant_format)

    def check(self) -> None:
        """Raise ValueError where the tensors do not fit each other; reads shapes and dtypes only."""
        B, codes, absmax = self.quant_format.block_size, self.codes, self.absmax
        if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % (B // 2):
            raise ValueError(f"codes must be uint8 [N, K/2] with K a multiple of {B}, got {described(codes)}")
        N, G = codes.shape[0], codes.shape[1] * 2 // B
        if tuple(absmax.shape) != (N, G):
            raise ValueError(f"absmax must be [N, K/{B}] = {[N, G]}, got {described(absmax)}")
        if (self.absmax_scales is None) != (self.absmax_offset is None):
            raise ValueError("absmax_scales and absmax_offset come together (double quantization) or not at all")
        if self.absmax_scales is None or self.absmax_offset is None:
            if absmax.dtype != (dtype := self.quant_format.scale_encoding.dtype):
                raise ValueError(
                    f"absmax without absmax_scales must be {str(dtype).removeprefix('torch.')}, got {absmax.dtype}"
                )
            return
        if absmax.dtype != torch.uint8:
            raise ValueError(f"absmax with absmax_scales must be uint8 codes, got {absmax.dtype}")
        _check_second_level(self.absmax_scales, self.absmax_offset, formats.second_level_blocks(N, G))


def _check_second_level(scales: Tensor, offset: Tensor, blocks: int) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) != (blocks,):
        raise ValueError(f"absmax_scales must be float32 [{blocks}], got {described(scales)}")
    if offset.dtype != torch.float32 or offset.numel() != 1:
        raise ValueError(f"absmax_offset must be one float32, got {described(offset)}")


def described(tensor: Tensor) -> str:
    """Its dtype and shape, for messages."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def pad_absmax(absmax_codes_NG: Tensor) -> Tensor:
    """uint8 [N, G rounded up to even]: a row must fill whole bf16 words. Integer padding, so no pattern changes."""
    return nn.functional.pad(absmax_codes_NG, (0, absmax_codes_NG.shape[1] % 2))
