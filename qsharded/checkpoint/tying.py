"""Whether a checkpoint's head is its embedding. config.json may say so and the files hold another head: they decide.

As transformers reads them: both stored and equal are one weight, both stored and different are two, and where
config.json ties them either one may be missing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.models import ModelConfig
from qsharded.shards import place_in, rows_of_rank

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_KEY = "tie_word_embeddings"


def open_tied(
    folder: Path, config: ModelConfig, mesh: DeviceMesh | None = None
) -> tuple[ModelConfig, SafetensorsFolder]:
    """``config`` as the files in ``folder`` bear it out, and these: a tied weight is called the embedding's there.

    Where both weights are stored, they are compared, piece by piece. Ranks that are given their ``mesh`` compare some
    rows each and decide together.

    Raises:
        ValueError: the files are missing or damaged.
    """
    source = SafetensorsFolder(folder)
    if not config.tie_word_embeddings:
        return config, source
    names = set(source.names())
    if HEAD in names and EMBEDDING not in names:
        return config, replace(source, renamed=(HEAD, EMBEDDING))
    if HEAD in names and not _are_equal(source, mesh):
        return replace(config, tie_word_embeddings=False), source
    return config, source


def described_as(described: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The content of config.json for a checkpoint that is tied, or not, as ``config`` is."""
    if bool(described.get(_KEY)) == config.tie_word_embeddings:
        return dict(described)
    return {**described, _KEY: config.tie_word_embeddings}


def _are_equal(source: SafetensorsFolder, mesh: DeviceMesh | None) -> bool:
    shape = source.shape(EMBEDDING)
    if len(shape) != 2 or source.shape(HEAD) != shape:
        return False
    ranks, rank = (1, 0) if mesh is None else place_in(mesh)
    equal = _equal_rows(source, *rows_of_rank(shape[0], ranks, rank))
    if mesh is None:
        return equal
    agreed = torch.tensor(int(equal), device=mesh.device_type)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=mesh.get_group(mesh.ndim - 1))
    return bool(agreed)


def _equal_rows(source: SafetensorsFolder, start: int, stop: int) -> bool:
    """Values are compared, whatever dtype each is stored in; NaN equals nothing, and loading refuses it by name."""
    row_bytes = source.shape(EMBEDDING)[1] * max(source.dtype(name).itemsize for name in (EMBEDDING, HEAD))
    step = source.rows_at_once(max(1, row_bytes))
    pieces = ((first, min(first + step, stop)) for first in range(start, stop, step))
    return all(bool((source.rows(EMBEDDING, *piece) == source.rows(HEAD, *piece)).all()) for piece in pieces)
