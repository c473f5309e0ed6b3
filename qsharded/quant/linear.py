"""A linear layer whose weight stays in 4 bits, NF4 or a format like it, laid out so that FSDP2 can shard it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.quant import backends, formats, ops


class NF4Linear(nn.Module):
    """``y = x W^T + b`` with a frozen NF4 weight, double-quantized unless it is made with ``double_quant=False``.

    The parameters are bytes viewed as bf16, because ``fully_shard`` takes floating-point parameters only; no
    arithmetic ever touches the view. Rows are whole, so sharding dim 0 never splits a block.

    It holds the other formats of bitsandbytes too, FP4 and blocks of 32 to 4096; the fast kernels are for blocks of 64.

    Attributes:
        weight: bf16 [N, K/4], the bytes of the codes uint8 [N, K/2].
        weight_absmax: bf16 [N, ceil(G/2)], the bytes of the absmax codes uint8 [N, G]; one zero byte pads an odd G.
            Without double quantization bf16 [N, 2G], the bytes of the absmax fp32 [N, G]. G = in_features / block_size.
        weight_absmax_scales: fp32 [ceil(N*G/256)], a buffer, whole on every rank; None without double quantization.
        weight_absmax_offset: fp32 [], likewise.
        bias: [N] or None.
        quant_type, block_size: those of :class:`qsharded.quant.formats.QuantFormat`.

    Raises:
        ValueError: ``in_features`` is no multiple of the block size, or there is no such format.
        TypeError: in forward, or in ``.to(dtype)``, ``.half()``, ``.float()``: the packed bytes would be destroyed.
    """

    weight_absmax_scales: Tensor | None
    weight_absmax_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        block_size: int = formats.BLOCK,
        double_quant: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        formats.QuantFormat(quant_type, block_size)  # raises where there is none
        if in_features % block_size:
            raise ValueError(f"in_features must be a multiple of {block_size}, got {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.block_size = quant_type, block_size
        G = in_features // block_size
        self.weight = _packed_parameter(out_features, in_features // 4, device)
        self.weight_absmax = _packed_parameter(out_features, -(-G // 2) if double_quant else 2 * G, device)
        scales = torch.zeros(formats.second_level_blocks(out_features, G), dtype=torch.float32, device=device)
        self.register_buffer("weight_absmax_scales", scales if double_quant else None)
        self.register_buffer("weight_absmax_offset", scales.new_zeros(()) if double_quant else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        name: str = "weight",
        *,
        quant_type: str = "nf4",
        block_size: int = formats.BLOCK,
        double_quant: bool = True,
    ) -> "NF4Linear":
        """Quantize ``linear`` on its device; on the meta device only the shapes are taken. The bias is shared.

        Raises:
            ValueError: as ``nf4.quantize``, naming the weight ``name``.
        """
        weight = linear.weight.detach()
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        new = cls(*sizes, quant_type=quant_type, block_size=block_size, double_quant=double_quant, device=weight.device)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        new.train(linear.training)
        if weight.is_meta:
            return new
        formats.check_weight(weight, new.quant_format, name)
        codes, absmax = ops.nf4_quantize(weight, quant_type, block_size)
        new.weight.data.view(torch.uint8).copy_(codes)
        if new.weight_absmax_scales is None or new.weight_absmax_offset is None:
            new.weight_absmax.data.view(torch.float32).copy_(absmax)
            return new
        absmax_codes, scales, offset = backends.double_quantize(absmax)
        new.weight_absmax.data.view(torch.uint8).copy_(pad_absmax(absmax_codes))
        new.weight_absmax_scales.copy_(scales)
        new.weight_absmax_offset.copy_(offset)
        return new

    @property
    def quant_format(self) -> formats.QuantFormat:
        """Its codebook and block size."""
        return formats.QuantFormat(self.quant_type, self.block_size)

    def packed(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(codes, absmax codes, absmax scales, absmax offset), or (codes, absmax fp32, None, None) without double
        quantization, as ``ops`` takes them: views, nothing is copied."""
        codes, absmax, G = self.weight, self.weight_absmax, self.in_features // self.block_size
        if codes.dtype != torch.bfloat16 or absmax.dtype != torch.bfloat16:
            name, packed = ("weight", codes) if codes.dtype != torch.bfloat16 else ("weight_absmax", absmax)
            raise TypeError(
                f"packed NF4 bytes are stored as bfloat16, but {name} arrived as {packed.dtype}: they are "
                "destroyed. With FSDP2, leave param_dtype at None or bfloat16"
            )
        if self.weight_absmax_scales is None:
            return codes.view(torch.uint8), absmax.view(torch.float32), None, None
        absmax_codes = absmax.view(torch.uint8)
        if G % 2:
            absmax_codes = absmax_codes[:, :G]
        return codes.view(torch.uint8), absmax_codes, self.weight_absmax_scales, self.weight_absmax_offset

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight [N, K] in ``dtype``."""
        return ops.nf4_dequantize(*self.packed(), dtype, self.quant_type, self.block_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it raises on the meta device
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.nf4_linear(x, *self.packed(), bias, self.quant_type, self.block_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        """Moves are for the bytes and the fp32 scales alike; casts are for the bias alone."""
        if fn(torch.empty(0, dtype=torch.bfloat16, device=self.weight.device)).dtype != torch.bfloat16:
            raise TypeError(
                "an NF4Linear cannot be cast: its packed bytes are stored as bfloat16 and a cast would destroy them. "
                "Cast the other modules, or choose the dtype when the model is made"
            )
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Refuse bytes that were cast on their way: copied back into bf16, other NaN patterns would come of them."""
        for name in ("weight", "weight_absmax"):
            stored, own = state_dict.get(prefix + name), self.get_parameter(name)
            if stored is not None and stored.shape == own.shape and stored.dtype != own.dtype:
                raise TypeError(f"{prefix}{name} must be bfloat16, as packed bytes are stored, got {stored.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, quant_type={self.quant_type}, block_size={self.block_size}"


def _packed_parameter(rows: int, columns: int, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16, device=device), requires_grad=False)


def pad_absmax(absmax_codes_NG: Tensor) -> Tensor:
    """uint8 [N, G rounded up to even]: a row must fill whole bf16 words. Integer padding, so no pattern changes."""
    return nn.functional.pad(absmax_codes_NG, (0, absmax_codes_NG.shape[1] % 2))
