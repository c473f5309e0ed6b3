"""The tensors that a checkpoint must hold, weights packed by us or by bitsandbytes among them.

Axes: N = out_features, K = in_features, B = weights in a block, G = K/B blocks in a row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from qsharded.checkpoint.mxfp4 import is_mxfp4
from qsharded.checkpoint.packed_format import (
    ABSMAX,
    BNB_ABSMAX,
    BNB_MAP,
    BNB_NESTED,
    BNB_NESTED_MAP,
    BNB_STATE,
    OFFSET,
    SCALES,
    packed_expert_specs,
)
from qsharded.checkpoint.scan import Stored
from qsharded.quant import blockwise8, formats

_PLAIN = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Expected:
    """Dtypes of which a tensor may be and its shape, or, where bytes are all that is said, their number."""

    dtypes: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    nbytes: int | None = None

    def faults(self, found: Stored) -> list[str]:
        """What of a stored tensor is otherwise."""
        faults = []
        if self.dtypes and found.dtype not in self.dtypes:
            faults.append(f"is {found.dtype}, must be {' or '.join(self.dtypes)}")
        if self.shape is not None and found.shape != self.shape:
            faults.append(f"is {list(found.shape)}, config.json asks for {list(self.shape)}")
        if self.nbytes is not None and found.nbytes != self.nbytes:
            faults.append(f"has {found.nbytes} bytes, config.json's shapes ask for {self.nbytes}")
        return faults


def packed_bytes(names: Iterable[str]) -> set[str]:
    """The tensors among ``names`` that hold codes: bytes, though their dtype may be a float's."""
    there = set(names)
    marks = (ABSMAX, SCALES)
    ours = {name.removesuffix(mark) for mark in marks for name in there if name.endswith(mark)}
    return ours | bitsandbytes_states(there).keys()


def bitsandbytes_states(names: Iterable[str]) -> dict[str, str]:
    """Of the weights that bitsandbytes packed, the names of what it notes beside them."""
    return {name.partition(BNB_STATE)[0]: name for name in names if BNB_STATE in name}


def expected_tensors(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], block_size: int
) -> dict[str, Expected]:
    """What must be there, by name.

    Args:
        shapes: of the model's weights in 16 bits.
        stored: what is there; it tells which weights are packed, and by whom.
        block_size: weights that share an absmax.
    """
    expected: dict[str, Expected] = {}
    packed, states = packed_bytes(stored), bitsandbytes_states(stored)
    for name, shape in shapes.items():
        if name not in packed:
            expected[name] = Expected(("U8",) if is_mxfp4(name) else _PLAIN, shape)
        elif len(shape) == 3:
            expected |= _experts_by_us(name, block_size, *shape)
        elif name in states:
            there = _by_bitsandbytes(name, block_size, *shape, is_nested=name + BNB_NESTED in stored)
            expected |= there | {states[name]: Expected(("U8",))}
        else:
            expected |= _by_us(name, block_size, *shape, is_nested=name + SCALES in stored)
    return expected


def _by_us(name: str, B: int, N: int, K: int, *, is_nested: bool) -> dict[str, Expected]:
    G = K // B
    common = {
        name: Expected(("U8",), (N, K // 2)),
        name + ABSMAX: Expected(("U8",), (N, G if is_nested else 4 * G)),  # codes, or the bytes of fp32 values
    }
    if not is_nested:
        return common
    return common | {
        name + SCALES: Expected(("F32",), (formats.second_level_blocks(N, G),)),
        name + OFFSET: Expected(("F32",), nbytes=4),
    }


def _experts_by_us(name: str, B: int, E: int, N: int, K: int) -> dict[str, Expected]:
    specs = packed_expert_specs(formats.QuantFormat(block_size=B), name, E, N, K)
    words = {torch.uint8: "U8", torch.float32: "F32"}
    return {tensor: Expected((words[spec[0]],), spec[1]) for tensor, spec in specs.items()}


def _by_bitsandbytes(name: str, B: int, N: int, K: int, *, is_nested: bool) -> dict[str, Expected]:
    G = K // B
    common = {
        name: Expected(nbytes=prod((N, K)) // 2),  # in any storage type
        name + BNB_ABSMAX: Expected(("U8",) if is_nested else ("F32",), (N * G,)),
        name + BNB_MAP: Expected(("F32",), (formats.codebook().numel(),)),
    }
    if not is_nested:
        return common
    return common | {
        name + BNB_NESTED: Expected(("F32",), (formats.second_level_blocks(N, G),)),
        name + BNB_NESTED_MAP: Expected(("F32",), (blockwise8.dynamic_map().numel(),)),
    }
