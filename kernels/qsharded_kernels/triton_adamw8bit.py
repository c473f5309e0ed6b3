"""AdamW on moments kept in 8 bits, in Triton: one launch for many parameters; without a GPU under TRITON_INTERPRET=1.

The bytes are those of ``qsharded.optim.reference``. Within a kernel B = blocks of one program, V = values of a block.
The callers check what users pass; the assertions here guard raw memory.
"""
# Triton's own language: the arguments of a kernel have no types that Python knows.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adamw8bit_checks as checks
from .triton_nf4 import _from_fp32, _reciprocal, _to_fp32

BLOCK = tl.constexpr(checks.STATE_BLOCK)
LARGEST = tl.constexpr(3.4028234663852886e38)
ZERO_CODE = tl.constexpr(checks.ZERO_CODE)
COEFFICIENTS = tl.constexpr(checks.COEFFICIENTS)
TABLE_COLUMNS = tl.constexpr(checks.TABLE_COLUMNS)

# 16 values a thread: each is a chain of eight look-ups, and several chains hide each other's latency
_BLOCKS, _WARPS = 8, 4
_INTERPRETED = triton.knobs.runtime.interpret  # as triton.jit found it
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.int16 if _INTERPRETED else tl.bfloat16}


def update(
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor | None,
    absmax2: Tensor | None,
    first_block: int,
    row_of_block: Tensor,
    table: Tensor,
    coefficients: Tensor,
    skip: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> None:
    """One step of the parameters behind consecutive blocks, of which the first is block ``first_block`` of all.

    ``state1``, ``state2``: uint8 [256 * blocks] with ``absmax1``, ``absmax2`` fp32 [blocks]; or fp32 with None.
    ``row_of_block``: int32 [blocks], a block's parameter. ``table``: int64 [parameters, 4]: addresses of parameter and
    gradient (0 for none), values, and where the first stands among the values of all blocks. ``coefficients``: fp32
    [parameters, 9], as the reference has them. ``skip``: fp32 [], not 0 to leave everything as it is. ``tables``: the
    signed and the unsigned map, fp32 [256], and their thresholds, fp32 [255]. ``dtype``: the parameters'.
    """
    blocks = row_of_block.numel()
    checks.assert_state(state1, state2, absmax1, absmax2, row_of_block, table, coefficients, skip, tables)
    with torch.cuda.device_of(state1):  # Triton launches on the current device
        _update_kernel[(triton.cdiv(blocks, _BLOCKS),)](
            state1,
            state2,
            absmax1,
            absmax2,
            first_block,
            blocks,
            row_of_block,
            table,
            coefficients,
            skip,
            *tables,
            TYPE=_TYPES[dtype],
            BLOCKS=_BLOCKS,
            QUANTIZED=absmax1 is not None,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # the reference rounds after each operation
        )


@triton.jit(do_not_specialize=["first_block", "blocks"])  # each bucket has its own
def _update_kernel(
    state1_ptr,
    state2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    first_block,
    blocks,
    row_of_block_ptr,
    table_ptr,
    coefficients_ptr,
    skip_ptr,
    map1_ptr,
    map2_ptr,
    thresholds1_ptr,
    thresholds2_ptr,
    TYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    if tl.load(skip_ptr) != 0:
        return
    block_B = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    row_B = tl.load(row_of_block_ptr + block_B, mask=block_B < blocks, other=0)
    entry_B = table_ptr + row_B * TABLE_COLUMNS
    gradient_B = tl.load(entry_B + 1)
    used_B = (block_B < blocks) & (gradient_B != 0)
    at_BV = block_B[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # among these blocks' values
    value_BV = at_BV + (first_block.to(tl.int64) * BLOCK - tl.load(entry_B + 3))[:, None]  # within its parameter
    inside_BV = used_B[:, None] & (value_BV >= 0) & (value_BV < tl.load(entry_B + 2)[:, None])
    parameter_BV = tl.load(entry_B).to(tl.pointer_type(TYPE))[:, None] + value_BV
    gradient_BV = gradient_B.to(tl.pointer_type(TYPE))[:, None] + value_BV

    coefficient_B = coefficients_ptr + row_B * COEFFICIENTS
    g_BV = _to_fp32(tl.load(gradient_BV, mask=inside_BV, other=0)) * tl.load(coefficient_B)[:, None]
    m_BV = _decode(state1_ptr + at_BV, absmax1_ptr, block_B, used_B, inside_BV, map1_ptr, QUANTIZED)
    v_BV = _decode(state2_ptr + at_BV, absmax2_ptr, block_B, used_B, inside_BV, map2_ptr, QUANTIZED)
    m_BV = m_BV * tl.load(coefficient_B + 1)[:, None] + g_BV * tl.load(coefficient_B + 2)[:, None]
    v_BV = v_BV * tl.load(coefficient_B + 3)[:, None] + g_BV * tl.load(coefficient_B + 4)[:, None] * g_BV
    v_BV = tl.minimum(v_BV, LARGEST)  # a v beyond fp32 would decode to NaN for good

    root_BV = tl.sqrt_rn(v_BV) * tl.load(coefficient_B + 8)[:, None] + tl.load(coefficient_B + 5)[:, None]
    p_BV = _to_fp32(tl.load(parameter_BV, mask=inside_BV, other=0)) * tl.load(coefficient_B + 6)[:, None]
    p_BV = p_BV - tl.div_rn(m_BV, root_BV) * tl.load(coefficient_B + 7)[:, None]
    tl.store(parameter_BV, _from_fp32(p_BV, TYPE), mask=inside_BV)
    _encode(m_BV, state1_ptr + at_BV, absmax1_ptr, block_B, used_B, inside_BV, thresholds1_ptr, True, QUANTIZED)
    _encode(v_BV, state2_ptr + at_BV, absmax2_ptr, block_B, used_B, inside_BV, thresholds2_ptr, False, QUANTIZED)


@triton.jit
def _decode(state_BV, absmax_ptr, block_B, used_B, inside_BV, map_ptr, QUANTIZED: tl.constexpr):
    """The fp32 moment behind ``state_BV``, pointers, and 0 outside."""
    state_BV = tl.load(state_BV, mask=inside_BV, other=0)
    if QUANTIZED:
        scale_B = tl.load(absmax_ptr + block_B, mask=used_B, other=0)
        return tl.where(inside_BV, tl.load(map_ptr + state_BV.to(tl.int32)) * scale_B[:, None], 0.0)
    else:
        return state_BV


@triton.jit
def _encode(
    value_BV,
    state_BV,
    absmax_ptr,
    block_B,
    used_B,
    inside_BV,
    thresholds_ptr,
    SIGNED: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Store the fp32 moment; outside it is 0."""
    if QUANTIZED:
        scale_B = tl.max(tl.abs(value_BV), axis=1)
        scaled_BV = tl.minimum(tl.maximum(value_BV * _reciprocal(scale_B)[:, None], -1.0), 1.0)
        # how many thresholds lie below, by halves of what is left of them
        code_BV = tl.zeros(value_BV.shape, tl.int32)
        for i in tl.static_range(8):
            half = 128 >> i
            below_BV = tl.load(thresholds_ptr + code_BV + (half - 1)) < scaled_BV
            code_BV += tl.where(below_BV, half, 0)
        if SIGNED:  # what is below zero stays below
            code_BV -= ((value_BV < 0) & (code_BV == ZERO_CODE)).to(tl.int32)
        tl.store(absmax_ptr + block_B, scale_B, mask=used_B)
        tl.store(state_BV, code_BV.to(tl.uint8), mask=inside_BV)
    else:
        tl.store(state_BV, value_BV, mask=inside_BV)
