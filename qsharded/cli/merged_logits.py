"""How far a merged model is from its base with the adapter beside it: their logits on a few rows of text.

Each runs in fp32 with one layer in memory at a time, after the other, so models of any size that merge are compared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.calibration.layer_walk import LayerWalk
from qsharded.checkpoint import read_ahead
from qsharded.checkpoint.adapter import copy_rows, stored_name
from qsharded.checkpoint.load import checkpoint_name, skeleton
from qsharded.checkpoint.merging import Merge
from qsharded.checkpoint.row_chunks import WeightSource
from qsharded.cli.check_rows import check_rows
from qsharded.data import Tokenizer
from qsharded.lora.config import LoRAConfig
from qsharded.models import CausalLM
from qsharded.models.choice import AnyConfig
from qsharded.models.parts import embedding_of, head_of, layers_of
from qsharded.utils.hardware import GIB, available_memory

_CPU = torch.device("cpu")
_FP32_BYTES = 4
# Weights that are rounded to bf16 once move the distributions by 1e-5 nats or so, a tensor that is missed by far more.
_MOST_KL = 0.01


class LogitsDiffer(ValueError):
    """The merged model is not its base with the adapter."""


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        config: of it.
        weights: as they are written.
        is_exact: whether they have 16 bits or more, so that nothing but rounding may set it apart.
    """

    config: AnyConfig
    weights: WeightSource
    is_exact: bool


@dataclass(frozen=True)
class Distance:
    """Of a model's logits from another's.

    Attributes:
        rows, tokens: how many were compared, and their length.
        largest: difference of two logits.
        mean_kl: Kullback-Leibler divergence of the distributions over the next token, in nats.
        same_top: part of the tokens after which both find the same one likeliest.
    """

    rows: int
    tokens: int
    largest: float
    mean_kl: float
    same_top: float

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2g}, mean KL divergence {self.mean_kl:.2g} nats, the same likeliest "
            f"token after {self.same_top:.1%}; {self.rows} rows of {self.tokens} tokens"
        )


def compare(merge: Merge, lora: LoRAConfig, merged: Merged, tokenizer: Tokenizer | None, rows: int) -> Distance:
    """Measure the merged model on so many rows.

    Args:
        tokenizer: of the model; without one the rows are random tokens.

    Raises:
        LogitsDiffer: it is further off than rounding explains.
        ValueError, MemoryError: as :func:`distance`.
    """
    ids = check_rows(tokenizer, rows, merged.config.vocab_size, merged.config.max_position_embeddings)
    found = distance(merge, lora, merged, ids)
    if merged.is_exact and not found.mean_kl <= _MOST_KL:  # of a NaN too
        raise LogitsDiffer(
            f"the merged model does not answer as the base with its adapter: {found}. Nothing was written. Rounding "
            f"does not explain it, unless the adapter's values are very large; --check-rows 0 writes it unseen"
        )
    return found


def distance(merge: Merge, lora: LoRAConfig, merged: Merged, ids_RS: Tensor) -> Distance:
    """Of the merged model from the base with its adapter.

    Args:
        merge: of the base and the adapter, open.
        lora: the adapter's.
        ids_RS: int64, of both models' vocabulary.

    Raises:
        ValueError: the model's code cannot be run layer by layer.
        MemoryError: the host has too little memory for it; how much it takes is said.
    """
    base = merge.model.config
    _refuse_too_large(_empty(base, lora), ids_RS)
    # a walk's embedding and head are in memory as long as it is: no name holds it
    expected = _logits(_AdaptedWalk(_empty(base, lora), merge, ids_RS), "the base with its adapter")
    got = _logits(LayerWalk(_empty(merged.config), merged.weights, ids_RS, _CPU), "the merged model")
    return _of_rows(list(zip(expected, got, strict=True)))


def _empty(config: AnyConfig, lora: LoRAConfig | None = None) -> CausalLM:
    return skeleton(config, lora, torch.float32, quant_format=None).eval()


def _logits(walk: LayerWalk, of: str) -> list[Tensor]:
    """[S, V] of each row."""
    for number in walk.in_turn(f"logits of {of}", shows_progress=True):
        walk.run(number, keep=True)
    return [row for rows in walk.logits() for row in rows]


def _of_rows(rows: list[tuple[Tensor, Tensor]]) -> Distance:
    """``rows``: [S, V] each, what is expected and what is compared with it."""
    largest, divergence, same = 0.0, 0.0, 0
    for expected, got in rows:
        largest = max(largest, (expected - got).abs().max().item())
        wanted, found = (F.log_softmax(logits.double(), -1) for logits in (expected, got))
        divergence += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
        same += int((expected.argmax(-1) == got.argmax(-1)).sum())
    tokens = rows[0][0].shape[0]
    count = len(rows) * tokens
    return Distance(len(rows), tokens, largest, max(0.0, divergence / count), same / count)


class _AdaptedWalk(LayerWalk):
    """One through the base, each of whose layers has its adapters beside it."""

    def __init__(self, model: CausalLM, merge: Merge, ids_RS: Tensor) -> None:
        super().__init__(model, merge.source, ids_RS, _CPU, merge.quant_format)
        self._merge = merge
        self._trained = {name: stored_name(model, name) for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _fill(self, chosen: Callable[[str], bool]) -> None:
        super()._fill(chosen)
        for name, parameter in self._model.named_parameters():
            here = checkpoint_name(name)
            if parameter.is_meta or not chosen(here):
                continue
            if name in self._trained:
                copy_rows(self._merge.file, self._trained[name], parameter, self._merge.path)
            else:
                parameter.copy_(self._merge.beside_adapters(here, parameter))


def _refuse_too_large(model: CausalLM, ids_RS: Tensor) -> None:
    needed, free = _needed(model, ids_RS), available_memory()
    if needed > free:
        raise MemoryError(f"it takes {needed / GIB:.1f} GiB of host memory, of which {free / GIB:.1f} are free")


def _needed(model: CausalLM, ids_RS: Tensor) -> int:
    """Bytes: the embedding, the head, a layer and what is made on its way, both models' logits, and for reading."""
    ends = _elements(embedding_of(model)) + _elements(head_of(model))
    layer = max(_elements(layer) for layer in layers_of(model))
    logits = ids_RS.numel() * model.config.vocab_size
    return _FP32_BYTES * (ends + 2 * layer + 6 * logits) + read_ahead.HOST_BYTES


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
