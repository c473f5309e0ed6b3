"""What layers that keep a weight in 4 bits have in common: bytes seen as bf16, moved but never cast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.quant import formats
from qsharded.quant.formats import QuantFormat


class PackedModule(nn.Module):
    """Holds the rows of one packed weight, or of several of one shape below each other, laid out for FSDP2.

    The parameters are bytes viewed as bf16, because ``fully_shard`` takes floating-point parameters only; no
    arithmetic ever touches the view. Rows are whole, so sharding dim 0 never splits a block.

    Attributes:
        weight: bf16 [rows, K/4], the bytes of the codes.
        weight_absmax: bf16, as many rows, the bytes of the blocks' absmax.
        weight_absmax_scales, weight_absmax_offset: fp32 buffers of the second level, whole on every rank, or None.
        quant_format: of the weight.

    Raises:
        TypeError: in ``.to(dtype)``, ``.half()``, ``.float()``: the packed bytes would be destroyed.
    """

    weight: nn.Parameter
    weight_absmax: nn.Parameter
    weight_absmax_scales: Tensor | None
    weight_absmax_offset: Tensor | None
    quant_format: QuantFormat

    @property
    def quant_type(self) -> str:
        """Its format's."""
        return self.quant_format.quant_type

    @property
    def block_size(self) -> int:
        """Its format's."""
        return self.quant_format.block_size

    def packed_parameters(self) -> tuple[Tensor, Tensor]:
        """Codes and absmax rows.

        Raises:
            TypeError: they were cast.
        """
        codes, absmax = self.weight, self.weight_absmax
        if codes.dtype != torch.bfloat16 or absmax.dtype != torch.bfloat16:
            name, packed = ("weight", codes) if codes.dtype != torch.bfloat16 else ("weight_absmax", absmax)
            raise TypeError(
                f"packed bytes are stored as bfloat16, but {name} arrived as {packed.dtype}: they are "
                "destroyed. With FSDP2, leave param_dtype at None or bfloat16"
            )
        return codes, absmax

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        """Moves are for the bytes and the fp32 scales alike; casts are for the bias alone."""
        if fn(torch.empty(0, dtype=torch.bfloat16, device=self.weight.device)).dtype != torch.bfloat16:
            raise TypeError(
                f"a {type(self).__name__} cannot be cast: its packed bytes are stored as bfloat16 and a cast would "
                "destroy them. Cast the other modules, or choose the dtype when the model is made"
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


def packed_parameter(dtype: torch.dtype, shape: formats.Size, device: torch.device | str | None) -> nn.Parameter:
    """For the rows of a stored tensor as whole bf16 words."""
    rows, columns = shape
    words = -(-columns * dtype.itemsize // torch.bfloat16.itemsize)
    return nn.Parameter(stored_zeros(torch.bfloat16, (rows, words), device), requires_grad=False)


def stored_zeros(dtype: torch.dtype, shape: formats.Size, device: torch.device | str | None) -> Tensor:
    """Of a stored tensor's shape."""
    return torch.zeros(shape, dtype=dtype, device=device)
