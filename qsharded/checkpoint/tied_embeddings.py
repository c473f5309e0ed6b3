"""Whether a checkpoint's head is its embedding. config.json may say so and the files hold another head: they decide.

As transformers reads them: both stored and equal are one weight, both stored and different are two, and where
config.json ties them either one may be missing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.models import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_KEY = "tie_word_embeddings"


def open_tied(folder: Path, config: ModelConfig) -> tuple[ModelConfig, SafetensorsFolder]:
    """``config`` as the files in ``folder`` bear it out, and these: a tied weight is called the embedding's there.

    Where both weights are stored, they are compared chunk by chunk as far as they are equal. Every rank compares all of
    them, so that none waits for another: weights that differ do so at once, and few files hold one weight twice.

    Raises:
        ValueError: the files are missing or damaged.
    """
    source = SafetensorsFolder(folder, is_wrapped=bool(config.wrapper))
    if not config.tie_word_embeddings:
        return config, source
    names = set(source.names())
    if HEAD in names and EMBEDDING not in names:
        return config, replace(source, renamed=(HEAD, EMBEDDING))
    if HEAD in names and not _are_equal(source):
        return replace(config, tie_word_embeddings=False), source
    return config, source


def described_as(described: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The content of config.json for a checkpoint that is tied, or not, as ``config`` is."""
    if ModelConfig.from_hf(described).tie_word_embeddings == config.tie_word_embeddings:
        return dict(described)
    return {**described, _KEY: config.tie_word_embeddings}


def _are_equal(source: SafetensorsFolder) -> bool:
    """Values are compared, whatever dtype each is stored in; NaN equals nothing, and loading refuses it by name."""
    shape = source.shape(EMBEDDING)
    if len(shape) != 2 or source.shape(HEAD) != shape:
        return False
    row_bytes = shape[1] * max(source.dtype(name).itemsize for name in (EMBEDDING, HEAD))
    step = source.rows_at_once(max(1, row_bytes))
    chunks = ((first, min(first + step, shape[0])) for first in range(0, shape[0], step))
    return all(bool((source.rows(EMBEDDING, *chunk) == source.rows(HEAD, *chunk)).all()) for chunk in chunks)
