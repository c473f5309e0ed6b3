"""How bitsandbytes stores an NF4 weight, read into the tensors of an NF4Linear. bitsandbytes itself is not needed.

A checkpoint holds, beside ``weight`` (the codes, in any storage type, flat): ``weight.absmax``, ``weight.quant_map``
and ``weight.quant_state.bitsandbytes__nf4`` (JSON as uint8), and with double quantization ("nested") also
``weight.nested_absmax`` and ``weight.nested_quant_map``. The codes are ours byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsharded import blockwise8, nf4
from qsharded.checkpoint import quantized
from qsharded.nn.nf4_linear import pad_absmax

_ABSMAX, _NESTED_ABSMAX, _MAP, _NESTED_MAP, _STATE = COMPANIONS = tuple(
    ending.removeprefix(".")
    for ending in (
        quantized.BNB_ABSMAX,
        quantized.BNB_NESTED,
        quantized.BNB_MAP,
        quantized.BNB_NESTED_MAP,
        quantized.BNB_STATE,
    )
)
"""What lies beside ``weight``, by names without "weight."."""


@dataclass(frozen=True)
class Settings:
    """What a bitsandbytes quantization_config says of the weights: doubly quantized or not, and which are left out."""

    double_quant: bool
    skipped: list[str] | None


def read_settings(config: Any) -> Settings:
    """The settings in a bitsandbytes quantization_config, a dict or transformers' class.

    Raises:
        ValueError: it is not bitsandbytes', or not of 4 bits in NF4.
    """
    described = config if isinstance(config, dict | None) else config.to_dict()
    packing = quantized.read_packing({quantized.CONFIG_KEY: described})
    if described is None or packing is None or packing.form != quantized.BITSANDBYTES:
        raise ValueError("the checkpoint is not quantized to 4 bits by bitsandbytes: its config.json does not say so")
    return Settings(packing.double_quant, described.get("llm_int8_skip_modules"))


def packed_tensors(stored: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(weight, absmax, scales, offset) as an NF4Linear holds them: the first two bytes seen as bf16.

    Args:
        stored: "weight" and its companions, by their names without "weight.".
        name: what messages call the weight.

    The bytes are shared where they can be: an odd number of blocks a row is padded, so copied.

    Raises:
        ValueError: a weight of another kind than NF4Linear holds (block size, type, levels), or tensors that do not fit
            each other.
    """
    if _STATE not in stored:
        raise ValueError(f"{name} comes without {name}.{_STATE}: it is no NF4 weight of bitsandbytes")
    state = json.loads(stored[_STATE].cpu().numpy().tobytes())
    check_kind(state["quant_type"], state["blocksize"], state.get("nested_blocksize"), name)
    check_map(stored[_MAP], nf4.levels("cpu"), name)
    offset = state.get("nested_offset")
    if offset is None:
        return (*rows_as_parameters(stored["weight"], stored[_ABSMAX], state["shape"], name), None, None)
    check_map(stored[_NESTED_MAP], blockwise8.dynamic_map(True, "cpu"), name)
    rows = rows_as_parameters(stored["weight"], stored[_ABSMAX], state["shape"], name)
    return (*rows, stored[_NESTED_ABSMAX], torch.tensor(offset, dtype=torch.float32, device=rows[0].device))


def rows_as_parameters(codes: Tensor, absmax: Tensor, shape: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
    """The flat codes (of any dtype) and absmax (uint8 or fp32) of a weight [N, K] as the bf16 rows of an NF4Linear.

    Raises:
        ValueError: K is no multiple of 64, or there are not as many bytes as the shape asks for.
    """
    N, K = shape
    rows = codes.reshape(-1).view(torch.uint8)
    if K % nf4.BLOCK or rows.numel() * 2 != N * K or absmax.numel() * nf4.BLOCK != N * K:
        raise ValueError(
            f"{name} is {[N, K]} with {rows.numel()} bytes of codes and {absmax.numel()} absmax: not NF4 in whole rows "
            "of blocks of 64"
        )
    absmax_NG = absmax.reshape(N, K // nf4.BLOCK)
    absmax_rows = absmax_NG.view(torch.uint8)
    if absmax_rows.shape[1] % 2:
        absmax_rows = pad_absmax(absmax_rows)
    return _as_bf16(rows.view(N, K // 2)), _as_bf16(absmax_rows)


def _as_bf16(rows: Tensor) -> Tensor:
    """uint8 rows seen as bf16; copied where they begin at an odd address."""
    return (rows if rows.storage_offset() % 2 == 0 else rows.clone()).view(torch.bfloat16)


def check_kind(quant_type: str, block_size: int, nested_block_size: int | None, name: str) -> None:
    """Raise ValueError for a weight that NF4Linear cannot hold."""
    if quant_type != "nf4" or block_size != nf4.BLOCK or nested_block_size not in (None, blockwise8.BLOCK):
        nested = f", its absmax in blocks of {nested_block_size}" if nested_block_size else ""
        raise ValueError(
            f"{name} is {quant_type} in blocks of {block_size}{nested}; only nf4 in blocks of 64, the absmax in fp32 "
            "or in blocks of 256, can be taken over"
        )


def check_map(found: Tensor, ours: Tensor, name: str) -> None:
    """Raise ValueError where a weight was quantized to other numbers than ours."""
    if not torch.equal(found.cpu(), ours):
        raise ValueError(f"{name} was quantized with another map than bitsandbytes' own; quantize the 16-bit model")
