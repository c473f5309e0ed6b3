"""How bitsandbytes stores a 4-bit weight, read into the tensors of a PackedLinear. bitsandbytes itself is not needed.

A checkpoint holds, beside ``weight`` (the codes, in any storage type, flat): ``weight.absmax``, ``weight.quant_map``
and ``weight.quant_state.bitsandbytes__nf4`` or ``__fp4`` (JSON as uint8), and with double quantization ("nested") also
``weight.nested_absmax`` and ``weight.nested_quant_map``. The codes are ours byte for byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qsharded.checkpoint import packed_format
from qsharded.quant import blockwise8, formats
from qsharded.quant.formats import QuantFormat
from qsharded.quant.packed_weight import pad_absmax
from qsharded.utils.untrusted_json import ANY, require

_ABSMAX, _NESTED_ABSMAX, _MAP, _NESTED_MAP = _TENSORS = tuple(
    ending.removeprefix(".")
    for ending in (
        packed_format.BNB_ABSMAX,
        packed_format.BNB_NESTED,
        packed_format.BNB_MAP,
        packed_format.BNB_NESTED_MAP,
    )
)


def companions(quant_type: str) -> tuple[str, ...]:
    """What lies beside ``weight``, by names without "weight."."""
    return (*_TENSORS, _state_name(quant_type))


def _state_name(quant_type: str) -> str:
    return packed_format.BNB_STATE.removeprefix(".") + quant_type


@dataclass(frozen=True)
class Settings:
    """What a bitsandbytes quantization_config says of the weights: to which codebook they are quantized, doubly or not,
    and which are left out."""

    quant_type: str
    double_quant: bool
    skipped: list[str] | None


def read_settings(config: Any) -> Settings:
    """The settings in a bitsandbytes quantization_config, a dict or transformers' class.

    Raises:
        ValueError: it is not bitsandbytes', or not of 4 bits.
    """
    described = config if isinstance(config, dict | None) else config.to_dict()
    storage_format = packed_format.read_storage_format({packed_format.CONFIG_KEY: described})
    if described is None or storage_format is None or storage_format.form != packed_format.BITSANDBYTES:
        raise ValueError("the checkpoint is not quantized to 4 bits by bitsandbytes: its config.json does not say so")
    return Settings(
        storage_format.quant_format.quant_type, storage_format.double_quant, described.get("llm_int8_skip_modules")
    )


def stored_block_size(files: Sequence[str], quant_type: str) -> int | None:
    """Weights in a block of the first packed weight in ``files``, of which the safetensors are looked at; None where
    there is none. The quantization_config does not say it."""
    ending = packed_format.BNB_STATE + quant_type
    for path in (path for path in files if path.endswith(".safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                if name.endswith(ending):
                    state = packed_format.read_bitsandbytes_state(file.get_tensor(name), f"{path}: {name}")
                    return state.get("blocksize")
    return None


def code_dtypes(files: Sequence[str], quant_type: str) -> set[str]:
    """The storage types of the packed weights in ``files``, as safetensors name them ("U8", "BF16"), of which headers
    alone are read."""
    ending = packed_format.BNB_STATE + quant_type
    found = set()
    for path in (path for path in files if path.endswith(".safetensors")):
        with safe_open(path, framework="pt") as file:
            weights = [name.removesuffix(ending) for name in file.keys() if name.endswith(ending)]  # noqa: SIM118
            found |= {file.get_slice(name).get_dtype() for name in weights}
    return found


def packed_tensors(
    stored: Mapping[str, Tensor], quant_format: QuantFormat, name: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(weight, absmax, scales, offset) as a PackedLinear holds them: the first two bytes seen as bf16.

    Args:
        stored: "weight" and its companions, by their names without "weight.".
        quant_format: of the layer.
        name: what messages call the weight.

    The bytes are shared where they can be: an odd number of blocks a row is padded, so copied.

    Raises:
        ValueError: a weight of another format than the layer's, or tensors that do not fit each other.
    """
    name_of_state = _state_name(quant_format.quant_type)
    if name_of_state not in stored:
        raise ValueError(f"{name} comes without {name}.{name_of_state}: it is no {quant_format} of bitsandbytes")
    state = packed_format.read_bitsandbytes_state(stored[name_of_state], f"{name}.{name_of_state}")
    require(state, dict.fromkeys(("quant_type", "blocksize", "shape"), ANY), f"{name}.{name_of_state}")
    found = quant_format_of(state["quant_type"], state["blocksize"], state.get("nested_blocksize"), name)
    if found != quant_format:
        raise ValueError(f"{name} is {found}, the checkpoint's first weight {quant_format}; all must be of one kind")
    check_map(stored[_MAP], formats.codebook("cpu", quant_format.quant_type), name)
    rows = rows_as_parameters(stored["weight"], stored[_ABSMAX], state["shape"], quant_format, name)
    offset = state.get("nested_offset")
    if offset is None:
        return (*rows, None, None)
    check_map(stored[_NESTED_MAP], blockwise8.dynamic_map(True, "cpu"), name)
    return (*rows, stored[_NESTED_ABSMAX], torch.tensor(offset, dtype=torch.float32, device=rows[0].device))


def rows_as_parameters(
    codes: Tensor, absmax: Tensor, shape: Sequence[int], quant_format: QuantFormat, name: str
) -> tuple[Tensor, Tensor]:
    """The flat codes (of any dtype) and absmax (uint8 or fp32) of a weight [N, K] as the bf16 rows of a PackedLinear.

    Raises:
        ValueError: K is no multiple of the block size, there are not as many bytes as the shape asks for, or the absmax
            is of another type.
    """
    N, K = shape
    B = quant_format.block_size
    if K % B:
        raise ValueError(packed_format.torn_rows(name, K, quant_format))
    rows = codes.reshape(-1).view(torch.uint8)
    if rows.numel() * 2 != N * K or absmax.numel() * B != N * K:
        raise ValueError(
            f"{name} is {[N, K]} with {rows.numel()} bytes of codes and {absmax.numel()} absmax: not {quant_format}"
        )
    if absmax.dtype not in (torch.uint8, torch.float32):
        # bitsandbytes saves that where it had reordered the layer for its kernel on CPUs, whose order nothing tells
        raise ValueError(
            f"{name} has its absmax in {absmax.dtype}, must be uint8 or float32; quantize the 16-bit model"
        )
    absmax_NG = absmax.reshape(N, K // B)
    absmax_rows = absmax_NG.view(torch.uint8)
    if absmax_rows.shape[1] % 2:
        absmax_rows = pad_absmax(absmax_rows)
    return _as_bf16(rows.view(N, K // 2)), _as_bf16(absmax_rows)


def _as_bf16(rows: Tensor) -> Tensor:
    """uint8 rows seen as bf16; copied where they begin at an odd address."""
    return (rows if rows.storage_offset() % 2 == 0 else rows.clone()).view(torch.bfloat16)


def quant_format_of(quant_type: str, block_size: int, nested_block_size: int | None, name: str) -> QuantFormat:
    """The format of the weight ``name``.

    Raises:
        ValueError: PackedLinear cannot hold it.
    """
    if nested_block_size not in (None, blockwise8.BLOCK):
        raise ValueError(f"{name} has its absmax in blocks of {nested_block_size}; only {blockwise8.BLOCK} is read")
    try:
        return QuantFormat(quant_type, block_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_map(found: Tensor, ours: Tensor, name: str) -> None:
    """Raise ValueError where a weight was quantized to other numbers than ours."""
    if not torch.equal(found.cpu(), ours):
        raise ValueError(f"{name} was quantized with another map than bitsandbytes' own; quantize the 16-bit model")
