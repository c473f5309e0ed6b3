"""The NF4 format: its codebook, codes and double quantization, in plain PyTorch. Every kernel is held to these bytes.

A weight ``[N, K]`` is cut into blocks of 64 along K. Each block keeps its largest magnitude (absmax, fp32) and, for
every weight, the index of the codebook's nearest value to ``weight / absmax``. Two indices share a byte, the first in
the high nibble. Double quantization stores ``absmax - mean(absmax)`` in 8 bits, in blocks of 256 over the flattened
absmax. Codes and fp32 absmax are byte for byte those of bitsandbytes 0.50 on CPU.
Source: Dettmers et al., "QLoRA", arXiv:2305.14314.

bitsandbytes has other formats like it, with another codebook (FP4) and other sizes of a block: :class:`QuantFormat`.

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = blocks in a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from qsharded.quant import blockwise8
from qsharded.quant.codebooks import CODEBOOKS
from qsharded.quant.scale_encoding import ABSMAX, ScaleEncoding
from qsharded.utils.argument_kinds import refuse_other_kind

BLOCK = 64
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

QuantType = Literal["nf4", "fp4"]
SCALE_ENCODINGS: dict[str, ScaleEncoding] = {"nf4": ABSMAX, "fp4": ABSMAX}
_CODES = 16
Size = tuple[int, ...]

SMALLEST_ABSMAX = 1e-38  # keeps the reciprocal finite in an all-zero block, whose codes then are those of 0
_ELEMENTS_AT_A_TIME = 1 << 24  # bounds the fp32 and int32 temporaries to 64 MiB each, whatever the weight's size


@dataclass(frozen=True)
class QuantFormat:
    """How a weight is quantized: to which codebook, in blocks of which size, with scales stored how.

    Attributes:
        quant_type: its name: "nf4", "fp4" or one of :func:`register_format`.
        block_size: weights in a block, one of ``BLOCK_SIZES``.

    Raises:
        ValueError: there is no such format.
    """

    quant_type: str = "nf4"
    block_size: int = BLOCK

    def __post_init__(self) -> None:
        # types too: these come from JSON, where a list cannot be looked up, and 64.0 equals 64 until it is a size
        if not isinstance(self.quant_type, str) or self.quant_type not in CODEBOOKS:
            raise ValueError(f"quant_type must be one of {tuple(CODEBOOKS)}, got {self.quant_type!r}")
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")

    def __str__(self) -> str:
        return f"{self.quant_type} in blocks of {self.block_size}"

    @property
    def codebook(self) -> tuple[float, ...]:
        """The 16 values of the codes, in units of a block's scale."""
        return CODEBOOKS[self.quant_type]

    @property
    def scale_encoding(self) -> ScaleEncoding:
        """How a block's scale is stored."""
        return SCALE_ENCODINGS[self.quant_type]

    def stored_tensors(self, N: int, K: int, *, double_quant: bool = True) -> dict[str, tuple[torch.dtype, Size]]:
        """Dtype and shape of each tensor of a weight [N, K], by the attributes of :class:`PackedWeight`.

        ``double_quant`` is for scales that nest; others are stored as their encoding says.
        """
        G = K // self.block_size
        codes: dict[str, tuple[torch.dtype, Size]] = {"codes": (torch.uint8, (N, K // 2))}
        if not (double_quant and self.scale_encoding.nests):
            return codes | {"absmax": (self.scale_encoding.dtype, (N, G))}
        scales = torch.float32, (second_level_blocks(N, G),)
        return codes | {"absmax": (torch.uint8, (N, G)), "absmax_scales": scales, "absmax_offset": (torch.float32, ())}


def register_format(quant_type: str, codebook: Sequence[float], scale_encoding: ScaleEncoding = ABSMAX) -> None:
    """Add a format to those that :class:`QuantFormat` names. The reference serves it, and kernels that are registered
    for it (``qsharded.quant.backends.register_kernels``); ours, written for any codebook, dequantize its blocks of 64
    where scales are absmax. Packed checkpoints are written and read in NF4 and FP4 alone.

    Args:
        codebook: 16 values from -1 to 1, in the order of their codes; a tie goes to the smaller value.
        scale_encoding: how a block's scale is stored.

    Raises:
        ValueError: the name is taken, or the codebook is another.
    """
    if quant_type in CODEBOOKS:
        raise ValueError(f"quant_type {quant_type!r} is registered already: choose another name")
    if len(codebook) != _CODES or not all(-1 <= value <= 1 for value in codebook):
        raise ValueError(f"the codebook of {quant_type!r} must be {_CODES} values from -1 to 1, got {list(codebook)}")
    CODEBOOKS[quant_type], SCALE_ENCODINGS[quant_type] = tuple(codebook), scale_encoding


NF4_64 = QuantFormat()


@dataclass(frozen=True)
class ReferenceWeight:
    """What the reference quantizer makes of a weight [N, K]: all that is stored, and the absmax that dequantizing uses.

    It computes in plain PyTorch, on its own, and so is what kernels and packed layers are held to. What kernels make,
    with the same attributes, is :class:`qsharded.nf4.NF4Weight`.
    Without double quantization ``absmax_codes`` and its fellows are None.

    Attributes:
        codes: uint8 [N, K/2].
        absmax: fp32 [N, G], as dequantizing uses it.
        absmax_codes: uint8 [N, G].
        absmax_scales: fp32 [ceil(N*G/256)].
        absmax_offset: fp32 [].
        quant_format: what it was quantized to.
    """

    codes: Tensor
    absmax: Tensor
    absmax_codes: Tensor | None
    absmax_scales: Tensor | None
    absmax_offset: Tensor | None
    quant_format: QuantFormat = NF4_64

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight [N, K] in ``dtype`` (bfloat16, float16 or float32)."""
        return dequantize_blocks(self.codes, self.absmax, dtype, self.quant_format)


def quantize(
    weight: Tensor, *, quant_type: str = "nf4", block_size: int = BLOCK, double_quant: bool = True
) -> ReferenceWeight:
    """The reference: ``weight`` [N, K] (bfloat16, float16 or float32) quantized in plain PyTorch on its own device, to
    the format of those two names. :func:`qsharded.nf4.quantize` gives the same bytes by kernels.

    Raises:
        ValueError: not two-dimensional, empty, K no multiple of ``block_size``, a format or dtype that there is not,
            or NaN or infinity among the weights.
    """
    quant_format = QuantFormat(quant_type, block_size)
    check_weight(weight, quant_format)
    codes, absmax = quantize_blocks(weight, quant_format)
    if not (double_quant and quant_format.scale_encoding.nests):
        return ReferenceWeight(codes, quant_format.scale_encoding.decode(absmax), None, None, None, quant_format)
    absmax_codes, scales, offset = double_quantize(absmax)
    dequantized = dequantize_absmax(absmax_codes, scales, offset)
    return ReferenceWeight(codes, dequantized, absmax_codes, scales, offset, quant_format)


def check_weight(weight: Tensor, quant_format: QuantFormat = NF4_64, name: str = "weight") -> None:
    """Raise ValueError where ``weight`` cannot be quantized, naming it ``name``."""
    refuse_other_kind(weight, Tensor, name, "a torch.Tensor")
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32 to be quantized, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix [N, K], got shape {tuple(weight.shape)}")
    if weight.shape[1] % quant_format.block_size:
        raise ValueError(f"{name}: in_features must be a multiple of {quant_format.block_size}, got {weight.shape[1]}")
    refuse_not_finite(all_finite(weight), name)


def all_finite(values: Tensor) -> Tensor:
    """Whether all of a non-empty float tensor is finite, as a bool on its device.

    The extremes tell: NaN is passed on to both. One pass; ``isfinite().all()`` takes 30 times as long on a CPU.
    """
    low, high = values.aminmax()
    return low.isfinite() & high.isfinite()


def refuse_not_finite(finite: Tensor, name: str) -> None:
    """Raise ValueError for the tensor ``name`` unless ``finite``, which a GPU is asked for here."""
    if not finite:
        raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged or was saved after a divergence")


@cache
def codebook(device: torch.device | str = "cpu", quant_type: str = "nf4") -> Tensor:
    """The 16 values by their codes, fp32. The tensor is shared: do not write to it."""
    return torch.tensor(QuantFormat(quant_type).codebook, dtype=torch.float32, device=device)


@cache
def thresholds(device: torch.device | str = "cpu", quant_type: str = "nf4") -> Tensor:
    """The 15 fp32 midpoints of the ascending values. The tensor is shared: do not write to it."""
    ascending = codebook(quant_type=quant_type).sort().values
    return ((ascending[:-1] + ascending[1:]) / 2).to(device)


@cache
def ascending_codes(device: torch.device, quant_type: str) -> Tensor:
    """uint8 [16]: the codes in the order of their values; of two zeros the lower code first."""
    return codebook(quant_type=quant_type).argsort(stable=True).to(torch.uint8).to(device)


@cache
def _codebook_pairs(device: torch.device, quant_type: str) -> Tensor:
    """Both values of each byte, fp32 [256, 2]: one look-up serves two codes."""
    byte = torch.arange(256, device="cpu")
    return codebook(quant_type=quant_type)[torch.stack([byte >> 4, byte & 15], dim=1)].to(device)


@torch.no_grad()
def quantize_blocks(weight_NK: Tensor, quant_format: QuantFormat = NF4_64) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K/2] and the scales [N, G] as they are stored, fp32 absmax for NF4; the reference that every
    quantize kernel equals byte for byte."""
    N, K = weight_NK.shape
    codes_NP = torch.empty(N, K // 2, dtype=torch.uint8, device=weight_NK.device)
    G, dtype = K // quant_format.block_size, quant_format.scale_encoding.dtype
    absmax_NG = torch.empty(N, G, dtype=dtype, device=weight_NK.device)
    for rows in _row_chunks(N, K):
        codes_NP[rows], absmax_NG[rows] = _quantize_rows(weight_NK[rows], quant_format)
    return codes_NP, absmax_NG


def _quantize_rows(weight_NK: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
    blocks_NGB = weight_NK.float().contiguous().unflatten(1, (-1, quant_format.block_size))
    absmax_NG = quant_format.scale_encoding.encode(blocks_NGB.abs().amax(-1))
    reciprocal = 1 / quant_format.scale_encoding.decode(absmax_NG).clamp(min=SMALLEST_ABSMAX)
    scaled = (blocks_NGB * reciprocal.unsqueeze(-1)).clamp(-1, 1)
    codes = nearest_codes(scaled, quant_format.quant_type).flatten(1)
    return two_to_a_byte(codes), absmax_NG


def two_to_a_byte(codes_NK: Tensor) -> Tensor:
    """uint8 [N, K/2] of uint8 codes, the first of each two in the high nibble."""
    return codes_NK[:, ::2] << 4 | codes_NK[:, 1::2]


def nearest_codes(scaled: Tensor, quant_type: str = "nf4") -> Tensor:
    """uint8, of the shape of ``scaled`` (fp32 from -1 to 1): the codes of the codebook's nearest values."""
    # bucketize puts a value that equals a threshold below it: a tie goes down
    index = torch.bucketize(scaled, thresholds(scaled.device, quant_type), out_int32=True)
    if quant_type == "nf4":
        return index.to(torch.uint8)  # its values ascend: no second look-up
    return ascending_codes(scaled.device, quant_type)[index]


def dequantize_blocks(
    codes_NP: Tensor, absmax_NG: Tensor, dtype: torch.dtype, quant_format: QuantFormat = NF4_64
) -> Tensor:
    """The weight [N, K]: value times scale (fp32, as its encoding decodes it: absmax for NF4) in fp32, rounded to
    ``dtype``; every dequantize kernel equals it."""
    N, P = codes_NP.shape
    out_NK = torch.empty(N, P * 2, dtype=dtype, device=codes_NP.device)
    for rows in _row_chunks(N, P * 2):
        out_NK[rows] = _dequantize_rows(codes_NP[rows], absmax_NG[rows], quant_format)
    return out_NK


def _dequantize_rows(codes_NP: Tensor, absmax_NG: Tensor, quant_format: QuantFormat) -> Tensor:
    pairs = _codebook_pairs(codes_NP.device, quant_format.quant_type).index_select(0, codes_NP.flatten().int())
    return (pairs.view(*absmax_NG.shape, quant_format.block_size) * absmax_NG.unsqueeze(-1)).flatten(1)


def dequantize_workspace(N: int, K: int) -> int:
    """Bytes that :func:`dequantize_blocks` takes beside its result: some rows' values in fp32, and their products."""
    return min(N, _rows_at_a_time(K)) * K * (4 + 4)


def _rows_at_a_time(K: int) -> int:
    return max(1, _ELEMENTS_AT_A_TIME // max(K, 1))


def _row_chunks(N: int, K: int) -> Iterator[slice]:
    step = _rows_at_a_time(K)
    return (slice(start, start + step) for start in range(0, N, step))


# Double quantization. A sharded weight is encoded by its ranks together to the very bytes that one process writes:
# each step below works on any run of whole rows, and what crosses ranks is exact (row sums gathered, maxima reduced).


def double_quantize(absmax_NG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, G], scales fp32 [ceil(N*G/256)] and offset fp32 [] of a whole weight's absmax."""
    N, G = absmax_NG.shape
    offset = absmax_offset(absmax_row_sums(absmax_NG), G)
    scales = absmax_scales(absmax_NG, offset, first_row=0, rows=N)
    return encode_absmax(absmax_NG, scales, offset, first_row=0), scales, offset


def absmax_row_sums(absmax_NG: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right, so that no device or thread count changes a bit."""
    sums_N = torch.zeros(absmax_NG.shape[0], dtype=torch.float64, device=absmax_NG.device)
    for column_N in absmax_NG.unbind(1):
        sums_N += column_N
    return sums_N


def absmax_offset(row_sums_N: Tensor, G: int) -> Tensor:
    """fp32 []: the mean of all absmax, from fp64 row sums added from first to last."""
    total = row_sums_N.cpu().cumsum(0)[-1]  # PyTorch's CPU cumsum runs in order on one thread
    return (total / (row_sums_N.numel() * G)).float().to(row_sums_N.device)


def absmax_scales(absmax_NG: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of the 256-blocks as far as these rows reach; 0 for blocks they do not touch.

    ``absmax_NG`` are the rows from ``first_row`` on of a weight of ``rows`` rows.
    """
    G = absmax_NG.shape[1]
    scales = torch.zeros(second_level_blocks(rows, G), dtype=torch.float32, device=absmax_NG.device)
    block = second_level_block(absmax_NG, first_row).flatten()
    return scales.scatter_reduce_(0, block, (absmax_NG - offset).abs().flatten(), "amax")


def encode_absmax(absmax_NG: Tensor, scales: Tensor, offset: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's scales and offset."""
    own_scales = scales[second_level_block(absmax_NG, first_row)]
    return blockwise8.nearest_codes(absmax_NG - offset, own_scales)


def dequantize_absmax(codes_NG: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """fp32 [N, G] of a whole weight: map entry times scale, plus offset, each rounded to fp32."""
    return blockwise8.dequantize(codes_NG, scales[second_level_block(codes_NG, 0)]) + offset


def second_level_blocks(N: int, G: int) -> int:
    """How many 256-blocks hold N*G absmax values."""
    return -(-N * G // blockwise8.BLOCK)


def second_level_block(rows_NG: Tensor, first_row: int) -> Tensor:
    """int64 [N, G]: the 256-block in which each absmax of these rows lies."""
    N, G = rows_NG.shape
    flat = torch.arange(first_row * G, (first_row + N) * G, device=rows_NG.device)
    return (flat // blockwise8.BLOCK).view(N, G)
