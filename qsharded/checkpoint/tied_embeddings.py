"""Whether a checkpoint's head is its embedding. config.json may say so and the files hold another head: they decide.

As transformers reads them: both stored and equal are one weight, both stored and different are two, and where
config.json ties them either one may be missing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.checkpoint.stored_names import as_called
from qsharded.models.choice import AnyConfig, ModelCode, read_config
from qsharded.models.config import ModelConfig
from qsharded.models.parts import PartNames
from qsharded.models.transformers_code.description import TransformersConfig

EMBEDDING, HEAD = f"{PartNames().embedding}.weight", f"{PartNames().head}.weight"
_KEY = "tie_word_embeddings"
_Config = TypeVar("_Config", ModelConfig, TransformersConfig, AnyConfig)


def open_tied(folder: Path, config: _Config) -> tuple[_Config, SafetensorsFolder]:
    """``config`` as the files in ``folder`` bear it out, and these: a tied weight is called the embedding's there.

    Where both weights are stored, they are compared chunk by chunk as far as they are equal. Every rank compares all of
    them, so that none waits for another: weights that differ do so at once, and few files hold one weight twice.

    Raises:
        ValueError: the files are missing or damaged.
    """
    source = as_called(SafetensorsFolder(folder, is_wrapped=bool(config.wrapper)), config)
    if not config.tie_word_embeddings:
        return config, source
    names, (embedding, head) = set(source.names()), tied_names(config)
    if head in names and embedding not in names:
        return config, replace(source, renamed=(head, embedding))
    if head in names and not _are_equal(source, embedding, head):
        return replace(config, tie_word_embeddings=False), source
    return config, source


def tied_names(config: AnyConfig) -> tuple[str, str]:
    """What a checkpoint calls the weights of embedding and head."""
    return f"{config.parts.embedding}.weight", f"{config.parts.head}.weight"


def described_as(described: Mapping[str, Any], config: AnyConfig) -> dict[str, Any]:
    """The content of config.json for a checkpoint that is tied, or not, as ``config`` is."""
    code: ModelCode = "native" if isinstance(config, ModelConfig) else "transformers"
    if read_config(described, code).tie_word_embeddings == config.tie_word_embeddings:
        return dict(described)
    return {**described, _KEY: config.tie_word_embeddings}


def _are_equal(source: SafetensorsFolder, embedding: str, head: str) -> bool:
    """Values are compared, whatever dtype each is stored in; NaN equals nothing, and loading refuses it by name."""
    shape = source.shape(embedding)
    if len(shape) != 2 or source.shape(head) != shape:
        return False
    row_bytes = shape[1] * max(source.dtype(name).itemsize for name in (embedding, head))
    step = source.rows_at_once(max(1, row_bytes))
    chunks = ((first, min(first + step, shape[0])) for first in range(0, shape[0], step))
    return all(bool((source.rows(embedding, *chunk) == source.rows(head, *chunk)).all()) for chunk in chunks)
