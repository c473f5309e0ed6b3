"""One projection of all the experts of a layer, in 16 or 32 bits or packed in 4, laid out so that FSDP2 can shard it.

The experts' matrices lie below each other in one parameter, [E N, K/4] of bf16 words, whose rows FSDP2 cuts: a shard's
edge may fall inside an expert. What is quantized is each matrix by itself: codes, absmax codes, second-level scales and
offset of expert e are those of ``nf4.quantize(W_e)``, byte for byte, for any number of ranks and whatever tensors of a
checkpoint they come from.

Decoding takes any choice of experts at once. Their absmax, one value for 64 weights, is decoded first by plain PyTorch,
which settles what differs between experts (second-level scales and offset); codes and absmax are then those of one tall
matrix, which one call of ``ops.nf4_dequantize`` decodes. The values are the same to the last bit.

Axes: E experts of the layer, n of them, N = out_features, K = in_features, P = K/2 code bytes, G = blocks in a row, S
second-level blocks of one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from qsharded.quant import backends, blockwise8, formats, ops
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.grouped import Groups, grouped_mm
from qsharded.quant.pack_weight import pack_weight, rounded
from qsharded.quant.packed_module import PackedModule, packed_parameter, stored_zeros
from qsharded.quant.packed_weight import PackedWeight
from qsharded.quant.pieces import Pieces
from qsharded.quant.routing import Chunk

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The two parameters in which transformers holds a layer's experts; gate and up share an adapter's A there."""


ExpertIndex = slice | Tensor | list[int]
"""Some of E experts: a slice of them, which makes views, or their numbers, int64."""


class ExpertWeights(Protocol):
    """The matrices of a projection, as a product asks for them."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What they are made of, to be saved for a backward."""

    @property
    def maker(self) -> "Callable[..., ExpertWeights]":
        """Makes the same of the same tensors, and holds none: a layer that is computed again brings others."""

    def decoded(self, chosen: ExpertIndex, dtype: torch.dtype) -> Tensor:
        """Those of the ``chosen`` experts, [n, N, K] in ``dtype``."""

    def are_decoded(self, rows: float, like: Tensor) -> bool:
        """Whether :meth:`product` dequantizes them first, each having so many rows like these on average."""

    def product(self, x_RK: Tensor, chunk: Chunk) -> Tensor:
        """x W^T, [R, N]: the rows of each of the chunk's groups with its expert's matrix."""

    def multiplied(self, x_RK: Tensor, pieces: Pieces) -> Tensor:
        """x W^T, [R, N]: each piece of rows with its expert's matrix; for those that are not ``are_decoded``."""


@dataclass(frozen=True)
class PlainExpertWeights:
    """Matrices in 16 or 32 bits, [E, N, K]."""

    weight_ENK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return self.weight_ENK.shape[1], self.weight_ENK.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one that there is."""
        return (self.weight_ENK,)

    @property
    def maker(self) -> "Callable[..., PlainExpertWeights]":
        """As :class:`ExpertWeights` says."""
        return PlainExpertWeights

    def decoded(self, chosen: ExpertIndex, dtype: torch.dtype) -> Tensor:
        """As :class:`ExpertWeights` says."""
        return self.weight_ENK[chosen].to(dtype)

    def are_decoded(self, rows: float, like: Tensor) -> bool:
        """As :class:`ExpertWeights` says: they are cast."""
        return True

    def product(self, x_RK: Tensor, chunk: Chunk) -> Tensor:
        """As :class:`ExpertWeights` says."""
        return grouped_mm(x_RK, self.decoded(chunk.index, x_RK.dtype).transpose(1, 2), chunk.groups)

    def multiplied(self, x_RK: Tensor, pieces: Pieces) -> Tensor:
        """Never asked for."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedExpertWeights:
    """Packed matrices: the tensors of :class:`PackedWeight`, each expert's behind the last's.

    Attributes:
        codes: uint8 [E, N, P].
        absmax: uint8 [E, N, G]; without double quantization as the format's scale encoding stores it.
        absmax_scales: fp32 [E, S], or None.
        absmax_offset: fp32 [E], or None.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scales: Tensor | None
    absmax_offset: Tensor | None
    quant_format: QuantFormat

    @classmethod
    def of(cls, experts: Sequence[PackedWeight]) -> "PackedExpertWeights":
        """Of matrices of one shape and format, which are copied."""
        codes, absmax, scales, offset = (
            None if parts[0] is None else torch.stack(parts)
            for parts in zip(*(e.tensors for e in experts), strict=True)
        )
        assert codes is not None
        assert absmax is not None
        return cls(codes, absmax, scales, offset, experts[0].quant_format)

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return self.codes.shape[1], self.codes.shape[2] * 2

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the attributes are listed."""
        return self.codes, self.absmax, self.absmax_scales, self.absmax_offset

    @property
    def maker(self) -> "Callable[..., PackedExpertWeights]":
        """As :class:`ExpertWeights` says."""
        return partial(PackedExpertWeights, quant_format=self.quant_format)

    def expert(self, e: int) -> PackedWeight:
        """One matrix [N, K]: views."""
        scales, offset = (None if tensor is None else tensor[e] for tensor in (self.absmax_scales, self.absmax_offset))
        return PackedWeight(self.codes[e], self.absmax[e], scales, offset, self.quant_format)

    def decoded(self, chosen: ExpertIndex, dtype: torch.dtype) -> Tensor:
        """As :class:`ExpertWeights` says."""
        codes_nNP, absmax_nNG = self.codes[chosen], self._decoded_absmax(chosen)
        tall = PackedWeight(codes_nNP.flatten(0, 1), absmax_nNG.flatten(0, 1), None, None, self.quant_format)
        return ops.nf4_dequantize(tall, dtype).unflatten(0, codes_nNP.shape[:2])

    def are_decoded(self, rows: float, like: Tensor) -> bool:
        """As :class:`ExpertWeights` says."""
        return backends.for_experts(self.shape, self.quant_format, rows, like) is None

    def product(self, x_RK: Tensor, chunk: Chunk) -> Tensor:
        """As :class:`ExpertWeights` says."""
        if isinstance(chunk.groups, Groups) and not self.are_decoded(len(x_RK) / len(chunk.experts), x_RK):
            groups = list(zip(chunk.experts, chunk.groups.counts, strict=True))
            return self.multiplied(x_RK, Pieces.of(groups, x_RK.device))
        return grouped_mm(x_RK, self.decoded(chunk.index, x_RK.dtype).transpose(1, 2), chunk.groups)

    def multiplied(self, x_RK: Tensor, pieces: Pieces) -> Tensor:
        """As :class:`ExpertWeights` says."""
        kernels = backends.for_experts(self.shape, self.quant_format, 1, x_RK)
        assert kernels is not None
        return kernels.experts_linear(x_RK, self.tensors, self.quant_format, pieces)

    def _decoded_absmax(self, chosen: ExpertIndex) -> Tensor:
        """[n, N, G] in the format's own encoding, which is fp32 for those that nest."""
        absmax_nNG = self.absmax[chosen]
        if self.absmax_scales is None or self.absmax_offset is None:
            return absmax_nNG
        block_NG = formats.second_level_block(absmax_nNG[0], 0)
        scales_nNG = self.absmax_scales[chosen][:, block_NG]
        # as formats.dequantize_absmax: each of the two steps is rounded to fp32
        return blockwise8.dequantize(absmax_nNG, scales_nNG) + self.absmax_offset[chosen][:, None, None]


AnyPackedWeight = PackedWeight | PackedExpertWeights
"""Of a linear layer, or of one projection of a layer's experts."""


class ExpertLinears(nn.Module):
    """``y = x W_e^T + b_e`` for each expert e, in 16 or 32 bits.

    Attributes:
        weight: [E, N, K].
        bias: [E, N] or None.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(experts, out_features)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def packed(self) -> ExpertWeights:
        """The matrices."""
        return PlainExpertWeights(self.weight)

    @torch.no_grad()
    def round_(self, quant_format: QuantFormat) -> None:
        """Have the values that the matrices have in ``quant_format``, where they can be packed."""
        if self.in_features % quant_format.block_size == 0:
            for weight_NK in self.weight:
                weight_NK.copy_(rounded(weight_NK, quant_format, weight_NK.dtype))

    @torch.no_grad()
    def hold_(self, packed: PackedExpertWeights) -> None:
        """Have the values that ``packed`` decodes to."""
        for e, weight_NK in enumerate(self.weight):
            weight_NK.copy_(ops.nf4_dequantize(packed.expert(e), weight_NK.dtype))


class PackedExperts(PackedModule):
    """:class:`ExpertLinears` with frozen matrices in 4 bits, double-quantized unless it is made otherwise.

    Attributes:
        weight: bf16 [E N, K/4], the bytes of the codes.
        weight_absmax: bf16 [E N, ceil(G/2)], the bytes of the absmax codes, padded as in :class:`PackedLinear`; without
            double quantization [E N, 2G].
        weight_absmax_scales: fp32 [E, S], a buffer, whole on every rank; None without double quantization.
        weight_absmax_offset: fp32 [E], likewise.
        bias: [E, N] or None.
        quant_format: of the matrices.

    Raises:
        ValueError: ``in_features`` is no multiple of the block size.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quant_format: QuantFormat = NF4_64,
        double_quant: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.quant_format = quant_format
        if in_features % quant_format.block_size:
            raise ValueError(f"in_features must be a multiple of {quant_format.block_size}, got {in_features}")
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        E, stored = experts, quant_format.stored_tensors(out_features, in_features, double_quant=double_quant)
        for name, part in (("weight", "codes"), ("weight_absmax", "absmax")):
            kind, (rows, columns) = stored[part]
            self.register_parameter(name, packed_parameter(kind, (E * rows, columns), device))
        for part in ("absmax_scales", "absmax_offset"):
            kind_and_shape = stored.get(part)
            zeros = kind_and_shape and stored_zeros(kind_and_shape[0], (E, *kind_and_shape[1]), device)
            self.register_buffer(f"weight_{part}", zeros)
        zeros = torch.zeros(E, out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(zeros, requires_grad=False) if bias else None

    @classmethod
    def from_experts(
        cls, experts: ExpertLinears, name: str = "weight", *, quant_format: QuantFormat, double_quant: bool = True
    ) -> "PackedExperts":
        """Quantize ``experts`` on their device; on the meta device only the shapes are taken. The bias is shared.

        Raises:
            ValueError: as ``nf4.quantize``, naming the weight ``name``.
        """
        weight_ENK, sizes = experts.weight.detach(), (experts.experts, experts.in_features, experts.out_features)
        new = cls(*sizes, quant_format=quant_format, double_quant=double_quant, device=weight_ENK.device)
        if experts.bias is not None:
            new.bias = nn.Parameter(experts.bias.detach().contiguous(), requires_grad=False)
        new.train(experts.training)
        if not weight_ENK.is_meta:
            for e, weight_NK in enumerate(weight_ENK):
                formats.check_weight(weight_NK, quant_format, f"{name}[{e}]")
                new._hold(e, pack_weight(weight_NK.contiguous(), quant_format, double_quant=double_quant))
        return new

    def _hold(self, e: int, packed: PackedWeight) -> None:
        for parameter, rows in zip((self.weight, self.weight_absmax), packed.stored_rows(), strict=True):
            own = parameter.data.view(torch.uint8).unflatten(0, (self.experts, -1))[e]
            own.copy_(rows.view(torch.uint8))
        second_level = (
            (self.weight_absmax_scales, packed.absmax_scales),
            (self.weight_absmax_offset, packed.absmax_offset),
        )
        for held, value in second_level:
            if held is not None and value is not None:
                held[e] = value

    def packed(self) -> PackedExpertWeights:
        """The matrices: views, nothing is copied.

        Raises:
            TypeError: their bytes were cast.
        """
        second_level = self.weight_absmax_scales, self.weight_absmax_offset
        tall = PackedWeight.from_stored_rows(*self.packed_parameters(), *second_level, self.quant_format)
        codes, absmax = (rows.unflatten(0, (self.experts, -1)) for rows in (tall.codes, tall.absmax))
        return PackedExpertWeights(codes, absmax, *second_level, self.quant_format)

    def extra_repr(self) -> str:
        sizes = f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.quant_format}"
