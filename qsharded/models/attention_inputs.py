"""What attention needs besides q, k and v, made once a step for all layers: rotary tables, and who may look at whom.

Axes: B batch, S queries, T keys (earlier, cached ones first, then the queries' own), E head dim, R rotated dims of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.models.config import ModelConfig
from qsharded.models.rope import RopeConfig, rope_tables
from qsharded.utils.documents import Boundaries

_LARGEST_HEAD_DIM = 256


def has_flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's FlashAttention serves, which takes documents and windows without a mask."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD_DIM


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer's attention takes beside q, k and v; layers of the same window and rotation share it.

    A query sees itself and earlier keys, of its own document alone. At most one of ``boundaries`` and ``mask_BST`` is
    there. Neither: causal among as many keys as queries, or one query that sees every key.

    Attributes:
        cos_BSR, sin_BSR: rotary tables [B or 1, S, R] in the activations' dtype; R is E, or less where only a part of
            each head is rotated. Where a layer has no rotary embedding, they turn by nothing.
        window: how many latest keys a query sees, itself included; None: all.
        boundaries: of the documents, where a kernel takes them.
        mask_BST: boolean [B or 1, 1, S, T], True where a query sees a key; window and documents are in it. In steps
            of a CUDA graph: what is added to the scores, in the activations' dtype.
        scale: of the scores; None: 1 / sqrt(E).
        softcap: c of c tanh(score / c), or None. A backend that is registered from outside must apply it, and scale.
        query_scale_BS: q is multiplied by it once it is rotated; None: by 1.
        documents_BT: each key's document, for layers that attend by a state; None: one, or no such layer.
        sinks_H: a layer's own: in each head's softmax one more score, to which no value belongs; None: none.
        is_routed_BS: False for padding, which a mixture of experts leaves out; None: all are tokens, or no such layer.
    """

    cos_BSR: Tensor
    sin_BSR: Tensor
    window: int | None = None
    boundaries: Boundaries | None = None
    mask_BST: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    query_scale_BS: Tensor | None = None
    documents_BT: Tensor | None = None
    is_routed_BS: Tensor | None = None
    sinks_H: Tensor | None = None


def attention_inputs(
    config: ModelConfig,
    positions_BS: Tensor,
    dtype: torch.dtype,
    *,
    documents_BT: Tensor | None = None,
    boundaries: Boundaries | None = None,
    keys: int | None = None,
    device: torch.device | None = None,
) -> tuple[AttentionInputs, ...]:
    """The inputs of each layer in turn.

    Args:
        positions_BS: each query's place in its document.
        dtype: of the activations.
        documents_BT: each key's document; -1 is padding. None: a row is a document.
        boundaries: those of ``documents_BT``, if they are known already; without cached keys.
        keys: T, where there are cached ones before the queries; else S.
        device: to choose for; by default the positions'. A plan asks for a GPU's inputs on the meta device.
    """
    device = device or positions_BS.device
    keys = positions_BS.shape[1] if keys is None else keys
    shared = partial(
        AttentionInputs,
        scale=config.attention_scale,
        softcap=config.score_softcap,
        query_scale_BS=_query_scale(config, positions_BS, dtype, keys),
        documents_BT=None if config.linear is None else documents_BT,
        is_routed_BS=_routed(config, positions_BS, documents_BT),
    )
    # the soft-capped backend reads boundaries on any device
    knows_documents = config.score_softcap is not None or has_flash_kernel(device, dtype, config.kernel_head_dim)
    if keys == positions_BS.shape[1] and knows_documents:
        sights = _by_boundaries(config, positions_BS, documents_BT, boundaries)
    else:
        sights = _by_masks(config, positions_BS, documents_BT, keys)
    tables = {
        rope: _tables(config, rope, positions_BS, dtype, documents_BT, keys) for rope in set(config.rope_of_layer)
    }
    return _of_layers(config, lambda window, rope: shared(*tables[rope], **sights[window]))


def _routed(config: ModelConfig, positions_BS: Tensor, documents_BT: Tensor | None) -> Tensor | None:
    """Where documents are not told a row is one, and padding behind it has position 0, as its first token has."""
    S = positions_BS.shape[1]
    if config.mixture is None or (documents_BT is None and S == 1):
        return None
    if documents_BT is not None:
        return documents_BT[:, -S:] >= 0
    has_next_BS = nn.functional.pad(positions_BS[:, 1:2] == 1, (0, S - 1))
    return (positions_BS > 0) | has_next_BS


def _of_layers(
    config: ModelConfig, make: Callable[[int | None, RopeConfig | None], AttentionInputs]
) -> tuple[AttentionInputs, ...]:
    """Those of each layer in turn, made once for all layers of the same window and rotation."""
    kinds = list(zip(config.layer_windows, config.rope_of_layer, strict=True))
    made = {kind: make(*kind) for kind in set(kinds)}
    return tuple(made[kind] for kind in kinds)


_Sights = dict[int | None, dict[str, Any]]
"""What of the inputs says who sees whom, for each of the model's windows."""


def _by_boundaries(
    config: ModelConfig, positions_BS: Tensor, documents_BS: Tensor | None, boundaries: Boundaries | None
) -> _Sights:
    """For a kernel that takes documents and windows."""
    rows, length = positions_BS.shape
    if boundaries is None and documents_BS is not None:
        boundaries = Boundaries.of(documents_BS)
    of_windows = boundaries or Boundaries.of_rows(rows, length, positions_BS.device)
    narrow = {window: _narrow(window, length) for window in config.layer_windows}
    return {
        window: {"window": seen, "boundaries": boundaries if seen is None else of_windows}
        for window, seen in narrow.items()
    }


def _by_masks(config: ModelConfig, positions_BS: Tensor, documents_BT: Tensor | None, keys: int) -> _Sights:
    queries, device = positions_BS.shape[1], positions_BS.device
    narrow = {window: _narrow(window, keys) for window in config.layer_windows}
    return {
        window: {"window": seen, "mask_BST": attention_mask(queries, keys, documents_BT, seen, device)}
        for window, seen in narrow.items()
    }


def _narrow(window: int | None, keys: int) -> int | None:
    """The window, if it is narrower than what there is to see."""
    return None if window is None or window >= keys else window


def _tables(
    config: ModelConfig,
    rope: RopeConfig | None,
    positions_BS: Tensor,
    dtype: torch.dtype,
    documents_BT: Tensor | None,
    keys: int,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, R]; without rotary embedding those of an angle of 0."""
    if rope is None:
        cos_BSE = torch.ones(*positions_BS.shape, config.rope_head_dim, dtype=dtype, device=positions_BS.device)
        return cos_BSE, torch.zeros_like(cos_BSE)
    is_long: bool | Tensor = False
    if rope.rope_type == "longrope" and keys > rope.original_length:
        is_long = True
        if documents_BT is not None:
            is_long = _document_lengths(positions_BS, documents_BT[:, keys - positions_BS.shape[1] :])
            is_long = is_long > rope.original_length
    return rope_tables(rope, config.rope_head_dim, positions_BS, dtype, is_long)


def _document_lengths(positions_BS: Tensor, documents_BS: Tensor) -> Tensor:
    """[B, S]: of each token's document, found on its device: what its last token's position is."""
    S = positions_BS.shape[1]
    is_last_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_last_BS[:, :-1] = documents_BS[:, 1:] != documents_BS[:, :-1]
    index_BS = torch.arange(S, device=positions_BS.device).where(is_last_BS, S - 1)
    last_BS = index_BS.flip(1).cummin(dim=1).values.flip(1)
    return positions_BS.gather(1, last_BS) + 1


def _query_scale(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype, keys: int) -> Tensor | None:
    """Llama 4's: it is 1, and so None, up to ``query_scale_length`` tokens."""
    if not config.query_scale_beta or keys <= config.query_scale_length:
        return None
    steps_BS = torch.floor(positions_BS / config.query_scale_length)
    return (1 + config.query_scale_beta * torch.log(1 + steps_BS)).to(dtype)


def attention_mask(
    queries: int, keys: int, documents_BT: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Boolean `[B or 1, 1, S, T]`, True where a query sees a key.

    None where `attend` needs no mask: plain causal rows, and one query that sees every key.

    A query sees itself and earlier keys, the latest `window` of them if given, of its own document alone. Padding
    (document -1) is one more document: its rows see themselves, so no row is empty and softmax has no 0/0.
    """
    if window is not None and window >= keys:
        window = None
    if documents_BT is None and window is None and queries in (1, keys):
        return None
    key_T = torch.arange(keys, device=device)
    query_S1 = key_T[keys - queries :, None]
    mask_BST = (key_T <= query_S1)[None]
    if window is not None:
        mask_BST = mask_BST & (key_T > query_S1 - window)
    if documents_BT is not None:
        mask_BST = mask_BST & (documents_BT[:, keys - queries :, None] == documents_BT[:, None, :])
    return mask_BST[:, None]


class StepInputs:
    """The inputs of one query a row, in steps of a CUDA graph: its position, and its place among the keys, are tensors.

    Args:
        dtype: of the activations.
        length: the most tokens of a row.
        gaps_B1: how many keys of padding each row begins with; None: none.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, length: int, device: torch.device, gaps_B1: Tensor | None
    ) -> None:
        positions_1S = torch.arange(length, device=device)[None]
        self._config, self._dtype, self._gaps_B1 = config, dtype, gaps_B1
        self._tables = {
            rope: _tables(config, rope, positions_1S, dtype, None, length) for rope in set(config.rope_of_layer)
        }
        self._query_scale_1S = _query_scale(config, positions_1S, dtype, length)

    def at(self, position_B1: Tensor, place_1: Tensor, keys: int) -> tuple[AttentionInputs, ...]:
        """Of each layer in turn, where the query is at ``place`` [1] of ``keys`` keys; those behind it are not seen."""
        config = self._config
        tables = {
            rope: (cos_1SR[0][position_B1], sin_1SR[0][position_B1])
            for rope, (cos_1SR, sin_1SR) in self._tables.items()
        }
        scale_1S = self._query_scale_1S
        shared = partial(
            AttentionInputs,
            scale=config.attention_scale,
            query_scale_BS=None if scale_1S is None else scale_1S[0][position_B1],
        )
        masks = {window: self._mask(place_1, keys, _narrow(window, keys)) for window in set(config.layer_windows)}
        return _of_layers(config, lambda window, rope: shared(*tables[rope], mask_BST=masks[window]))

    def _mask(self, place_1: Tensor, keys: int, window: int | None) -> Tensor:
        key_1T = torch.arange(keys, device=place_1.device)[None]
        seen_BT = key_1T <= place_1
        if window is not None:
            seen_BT = seen_BT & (key_1T > place_1 - window)
        if self._gaps_B1 is not None:
            seen_BT = seen_BT & (key_1T >= self._gaps_B1)
        hidden_BT = torch.zeros_like(seen_BT, dtype=self._dtype).masked_fill(~seen_BT, -torch.inf)
        return hidden_BT[:, None, None]
