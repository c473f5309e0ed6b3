"""A checkpoint's tensors as a GGUF file holds them: names, order of rows, and the type of each.

Names of tensors are the ``gguf`` package's own, and so is what quantizes them. Which type a tensor gets is llama.cpp's
choice: vectors are F32; a matrix is quantized as was asked, or is F16 where its rows are no whole quantization blocks;
beside Q4_0 the head, or the embedding that is the head too, has more bits: Q8_0, which llama.cpp takes there where
rows do not suit its Q6_K, and which the package can write.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.checkpoint.tied_embeddings import HEAD, tied_names
from qsharded.models import ModelConfig
from qsharded.models.rope import frequency_divisors

GgufType = Literal["auto", "f16", "q8_0", "q4_0"]
_Type = gguf.GGMLQuantizationType
_STORED = {torch.bfloat16: _Type.BF16, torch.float16: _Type.F16, torch.float32: _Type.F32}
_ASKED = {"f16": _Type.F16, "q8_0": _Type.Q8_0, "q4_0": _Type.Q4_0}
_RECOMPUTED = ".rotary_emb.inv_freq"  # old checkpoints hold it
_ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file; ``read`` gives its values, in any dtype."""

    name: str
    shape: tuple[int, ...]
    type: Any
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self._byte_shape)

    @property
    def _byte_shape(self) -> tuple[int, ...]:
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.type))

    def announce(self, writer: Any) -> None:
        """Its name, shape and type; as bytes, since numpy lacks most types."""
        writer.add_tensor_info(self.name, self._byte_shape, np.dtype(np.uint8), self.nbytes, self.type)

    def values(self) -> np.ndarray:
        """Its bytes, made of a few rows at once.

        Raises:
            ValueError: a value that F16 does not hold.
        """
        tensor = self.read()
        rows = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(self.shape[1:])))
        return np.concatenate([self._encoded(part) for part in tensor.split(rows)])

    def _encoded(self, rows: Tensor) -> np.ndarray:
        if self.type in (_Type.BF16, _Type.F16, _Type.F32):
            same = rows.to(next(dtype for dtype, kind in _STORED.items() if kind == self.type))
            if self.type == _Type.F16 and not same.isfinite().all():
                raise ValueError(f"{self.name} holds values that F16 does not; write it in another type")
            return same.contiguous().view(torch.uint8).numpy()
        return gguf.quants.quantize(rows.float().numpy(), self.type)


def planned_tensors(
    config: ModelConfig, arch: Any, source: SafetensorsFolder, wanted: GgufType
) -> Iterator[PlannedTensor]:
    """Every tensor of the file, in its order.

    Args:
        arch: a ``gguf.MODEL_ARCH``.
        wanted: the matrices' type; "auto" is the one that the checkpoint has.

    Raises:
        ValueError: a tensor that GGUF has no name for.
    """
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    last = tied_names(config)[0] if config.tie_word_embeddings else HEAD
    for stored in source.names():
        if stored.endswith(_RECOMPUTED) or (stored == HEAD and config.tie_word_embeddings):
            continue
        name, shape = names.get_name(stored, try_suffixes=(".weight", ".bias")), source.shape(stored)
        if name is None:
            raise ValueError(f"{stored} has no name in GGUF's architecture {gguf.MODEL_ARCH_NAMES[arch]}")
        chosen = _type(shape, source.dtype(stored), wanted, is_last=stored == last)
        yield PlannedTensor(name, shape, chosen, partial(_rows, source, stored, permuted_heads(stored, config, arch)))
    if config.rope.rope_type == "llama3":
        divisors = frequency_divisors(config.rope, config.head_dim)
        yield PlannedTensor("rope_freqs.weight", tuple(divisors.shape), _Type.F32, lambda: divisors)


def _type(shape: tuple[int, ...], stored: torch.dtype, wanted: GgufType, *, is_last: bool) -> Any:
    """``is_last``: whether the tensor gives the logits."""
    if len(shape) == 1:
        return _Type.F32
    if wanted == "auto":
        return _STORED[stored]
    chosen = _Type.Q8_0 if is_last and wanted == "q4_0" else _ASKED[wanted]
    return _Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] else chosen


def permuted_heads(stored: str, config: ModelConfig, arch: Any) -> int | None:
    """How many heads the rows of a tensor are of, if they are in another order in GGUF."""
    if arch != gguf.MODEL_ARCH.LLAMA:
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stored.split(".")[-2])


def _rows(source: SafetensorsFolder, name: str, heads: int | None) -> Tensor:
    rows = source.whole(name)
    return rows if heads is None else neighbours_paired(rows, heads)


def neighbours_paired(rows: Tensor, heads: int) -> Tensor:
    """The rows [heads * head_dim, ...] of q or k, those that rotary embedding pairs (head_dim / 2 apart) in turn."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def halves_paired(rows: Tensor, heads: int) -> Tensor:
    """What :func:`neighbours_paired` was given, of what it returns."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
