"""A linear layer whose weight stays in 4 bits, NF4 or a format like it, laid out so that FSDP2 can shard it."""

import torch
from torch import Tensor, nn

from qsharded.quant import formats, ops
from qsharded.quant.pack_weight import pack_weight
from qsharded.quant.packed_module import PackedModule, packed_parameter, stored_zeros
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils.argument_kinds import refuse_other_kind


class PackedLinear(PackedModule):
    """``y = x W^T + b`` with a frozen weight in 4 bits, double-quantized unless it is made with ``double_quant=False``.

    The usual format is NF4 in blocks of 64, and the fast kernels are for it. Of any other it holds the bytes as well:
    FP4, blocks of 32 to 4096, and what ``formats.register_format`` adds.

    Attributes:
        weight: bf16 [N, K/4], the bytes of the codes uint8 [N, K/2].
        weight_absmax: bf16 [N, ceil(G/2)], the bytes of the absmax codes uint8 [N, G]; one zero byte pads an odd G.
            Without double quantization bf16 [N, 2G], the bytes of the absmax fp32 [N, G]. G = in_features / block_size.
        weight_absmax_scales: fp32 [ceil(N*G/256)], a buffer, whole on every rank; None without double quantization.
        weight_absmax_offset: fp32 [], likewise.
        bias: [N] or None.
        quant_format: of the weight.

    Raises:
        ValueError: ``in_features`` is no multiple of the block size, or there is no such format.
        TypeError: in forward, or in ``.to(dtype)``, ``.half()``, ``.float()``: the packed bytes would be destroyed.
    """

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
        self.quant_format = formats.QuantFormat(quant_type, block_size)
        if in_features % block_size:
            raise ValueError(f"in_features must be a multiple of {block_size}, got {in_features}")
        self.in_features, self.out_features = in_features, out_features
        stored = self.quant_format.stored_tensors(out_features, in_features, double_quant=double_quant)
        self.weight = packed_parameter(*stored["codes"], device)
        self.weight_absmax = packed_parameter(*stored["absmax"], device)
        for name in ("absmax_scales", "absmax_offset"):
            zeros = stored_zeros(*stored[name], device) if name in stored else None
            self.register_buffer(f"weight_{name}", zeros)
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
    ) -> "PackedLinear":
        """Quantize ``linear`` on its device; on the meta device only the shapes are taken. The bias is shared.

        Raises:
            ValueError: as ``nf4.quantize``, naming the weight ``name``.
        """
        refuse_other_kind(linear, nn.Linear, "linear", "an nn.Linear")
        weight = linear.weight.detach()
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        new = cls(*sizes, quant_type=quant_type, block_size=block_size, double_quant=double_quant, device=weight.device)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        new.train(linear.training)
        if weight.is_meta:
            return new
        formats.check_weight(weight, new.quant_format, name)
        new._hold(pack_weight(weight, new.quant_format, double_quant=double_quant))
        return new

    def _hold(self, packed: PackedWeight) -> None:
        for parameter, rows in zip((self.weight, self.weight_absmax), packed.stored_rows(), strict=True):
            parameter.data.view(torch.uint8).copy_(rows.view(torch.uint8))
        second_level = ("weight_absmax_scales", packed.absmax_scales), ("weight_absmax_offset", packed.absmax_offset)
        for name, value in second_level:
            if value is not None:
                self.get_buffer(name).copy_(value)

    def packed(self) -> PackedWeight:
        """The weight as ``ops`` takes it: views, nothing is copied."""
        second_level = self.weight_absmax_scales, self.weight_absmax_offset
        return PackedWeight.from_stored_rows(*self.packed_parameters(), *second_level, self.quant_format)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight [N, K] in ``dtype``."""
        return ops.nf4_dequantize(self.packed(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it raises on the meta device
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.nf4_linear(x, self.packed(), bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, quant_type={self.quant_type}, block_size={self.block_size}"
