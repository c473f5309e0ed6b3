"""Fold a LoRA adapter into its checkpoint, file by file, with one tensor in memory at a time.

Axes: N = out_features, K = in_features.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qsharded.checkpoint import safetensors_header
from qsharded.checkpoint.merging import Base, Merge, opened
from qsharded.checkpoint.source import INDEX, SafetensorsFolder
from qsharded.checkpoint.tied_embeddings import described_as, tied_names
from qsharded.models.choice import AnyConfig
from qsharded.quant import formats
from qsharded.utils.durable_files import Replacement
from qsharded.utils.untrusted_json import read_json

logger = logging.getLogger(__name__)


def merge_weights(
    checkpoint: Path, adapter: Path, target: Path, base: Base, block_size: int = formats.BLOCK
) -> dict[str, Any]:
    """Write the safetensors of ``checkpoint`` into ``target``, under their names, with the adapter folded in.

    Update and sum are taken in fp32 and rounded once, to the dtype that the checkpoint stores. Everything is checked
    before anything is written. The most that is held is one tensor of the checkpoint, in fp32 and its own dtype.
    An adapter on one of a tied embedding and head unties them: the other, which it does not change, keeps its tensor.

    Args:
        checkpoint: a folder, as ``find_checkpoint`` gives it.
        adapter: a folder that PEFT or qsharded wrote.
        target: an existing folder.
        base: "16bit" adds to the checkpoint's weights, "nf4" and "fp4" to what is left of them after quantization,
            which is what the adapter was trained on.
        block_size: of that quantization.

    Returns the JSON files of the checkpoint that are to be others for the merged one, by name.

    Raises:
        ValueError: checkpoint or adapter is damaged, not supported, or not made for the other; a checkpoint that is
            packed already; a merged weight that is not finite. The tensor is named.
    """
    with opened(checkpoint, adapter, base, block_size) as merge:
        source, config = merge.source, merge.model.config
        embedding, _ = tied_names(config)
        added = _untied(config, source, merge)
        for path in source.files():
            logger.info("merging %s", path.name)
            copies = added if path == source.file_of(embedding) else {}
            _rewrite(path, target / path.relative_to(checkpoint), merge.tensor, copies)
    if merge.adapts_an_end():
        config = replace(config, tie_word_embeddings=False)
    return _changed_json(checkpoint, source, read_json(checkpoint / "config.json"), config, added)


def _untied(config: AnyConfig, source: SafetensorsFolder, merge: Merge) -> dict[str, str]:
    """Tensors to add, each as a copy of a stored one: of a tied pair that will differ, the one that is missing. Both by
    their names in the files."""
    embedding, head = tied_names(config)
    if not (config.tie_word_embeddings and merge.adapts_an_end()) or head in source.names():
        return {}
    embedding, head = source.name_in_files(embedding), source.name_in_files(head)
    return {embedding: head} if source.renamed else {head: embedding}


def _changed_json(
    checkpoint: Path, source: SafetensorsFolder, described: dict[str, Any], config: AnyConfig, added: dict[str, str]
) -> dict[str, Any]:
    changed, says = {}, described_as(described, config)
    if says != described:
        changed["config.json"] = says
    if added and source.index is not None:
        index = read_json(source.index)
        embedding, _ = tied_names(config)
        file = source.file_of(embedding).relative_to(checkpoint).as_posix()
        index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(added, file)}.items()))
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += source.nbytes(embedding)
        changed[INDEX] = index
    return changed


def _rewrite(source: Path, target: Path, change: Callable[[str, Tensor], Tensor], copies: Mapping[str, str]) -> None:
    """Copy a safetensors file with its tensors changed. Names, shapes and dtypes stay, and so the header does, but for
    ``copies``, tensors to add: a new name each, and the stored tensor of which it gets what ``change`` makes of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    header = safetensors_header.extended(safetensors_header.read(source), copies)
    head = safetensors_header.head(header)
    nbytes = len(head) + safetensors_header.data_bytes(header)
    with safe_open(source, framework="pt") as file, Replacement(target, nbytes) as out:
        out.write(head)
        for name, origin in [*((name, name) for name in file.offset_keys()), *copies.items()]:
            stored = file.get_tensor(origin)
            changed = change(name, stored)
            assert (changed.shape, changed.dtype) == (stored.shape, stored.dtype)
            out.write(changed.contiguous().flatten().view(torch.uint8).numpy().data)
