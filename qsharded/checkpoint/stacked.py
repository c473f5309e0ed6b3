"""Experts that a checkpoint stores one by one and the model holds in one tensor: read into it row by row.

Axes: E experts, R rows of one, which come in equal parts from one tensor or from several behind each other, D columns.
"""

import logging
from collections.abc import Iterable, Iterator

from torch import Tensor

from qsharded.checkpoint import expert_fills, fill_shards
from qsharded.checkpoint.expert_layouts import is_of_experts, other_count
from qsharded.checkpoint.row_chunks import WeightSource
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.utils.sharding import local, own_rows

logger = logging.getLogger(__name__)


def warn_of_adapters_beside(source: SafetensorsFolder, whole: Iterable[str], adapted: Iterable[str]) -> None:
    """Say that PEFT will not read adapters on layers that have an expert's name: it takes them for the experts'.

    Args:
        whole: the model's parameters, the experts' among them that are in no layout that is known here.
        adapted: layers with an adapter.
    """
    kept = [source.stacked[name] for name in whole if name in source.stacked]
    parts = {part.split(".")[-2] for experts in kept for part in experts[0]}
    shared = sorted(parts & {name.rpartition(".")[2] for name in adapted})
    if shared:
        logger.warning(
            "adapters on %s: PEFT takes these for the experts', which are stored under the same names, and so does not "
            "read this adapter; for use there, name other layers in --lora-target-modules",
            ", ".join(shared),
        )


def is_stacked(source: WeightSource, name: str) -> bool:
    """Whether the model's tensor ``name`` is stored in parts."""
    return isinstance(source, SafetensorsFolder) and name in source.stacked


def shapes_in_files(source: WeightSource, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the files must hold for tensors of ``shapes`` in the model, by the names that ``source`` gives.

    Raises:
        ValueError: there are not as many experts.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if is_of_experts(name):
            found |= expert_fills.shapes_in_files(source, name, shape)
        else:
            found |= _of_parts(source, name, shape) if is_stacked(source, name) else {name: shape}
    return found


def _of_parts(source: WeightSource, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    assert isinstance(source, SafetensorsFolder)
    (E, R, D), experts = shape, source.stacked[name]
    if len(experts) != E or R % len(experts[0]):
        first = [parts[0] for parts in experts]
        raise ValueError(f"{source.file_of(first[0])}: {other_count(name, first, E)}, of {R} rows each")
    return {part: (R // len(parts), D) for parts in experts for part in parts}


def fills(source: WeightSource, name: str, parameter: Tensor) -> Iterator[fill_shards.Fill]:
    """What fills this rank's experts of ``parameter``."""
    assert isinstance(source, SafetensorsFolder)
    own_ERD, rows = local(parameter).detach(), own_rows(parameter)
    for index, parts in enumerate(source.stacked[name][rows.start : rows.stop]):
        first = 0
        for part in parts:
            count = source.shape(part)[0]
            yield fill_shards.RowsFill(source, part, own_ERD[index, first : first + count])
            first += count
