"""Whether the disk has room for what a run writes: its adapter, and its checkpoints."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qsharded.config import TrainConfig
from qsharded.plan.optimizer import state_bytes
from qsharded.utils.durable_files import folder_bytes, free_bytes

_HEADERS = 1 << 18  # bytes, at most: headers of safetensors, adapter_config.json, the manifest


@dataclass(frozen=True)
class Sizes:
    """Bytes on the disk of an adapter, of a checkpoint, and of a checkpoint while it is written: it has the ranks'
    rows of the adapter beside the joined one then."""

    adapter: int
    checkpoint: int
    unfinished_checkpoint: int

    @classmethod
    def of(cls, trained: Iterable[nn.Parameter], optim: str, tokenizer: Iterable[Path]) -> "Sizes":
        """For what trains, whole or sharded, or on the meta device, under ``--optim``; and the tokenizer's files, which
        lie beside the adapter."""
        parameters = list(trained)
        weights = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
        checkpoint = weights + state_bytes(parameters, optim, ranks=1) + _HEADERS
        return cls(weights + folder_bytes(tokenizer) + _HEADERS, checkpoint, weights + checkpoint)


def refuse_full_disk(config: TrainConfig, sizes: Sizes, *, freed: int, resumed: bool) -> None:
    """Look before anything is read: the adapter must fit, and one checkpoint beside it if there is none to go on from.

    Args:
        freed: bytes of what the run will replace.
        resumed: whether a checkpoint in the output folder is gone on from.

    Raises:
        ValueError: naming the folder, the bytes needed and those free.
    """
    free = free_bytes(Path(config.output_dir))
    is_checkpoint_needed = config.save_steps > 0 and not resumed
    needed = sizes.adapter + (sizes.unfinished_checkpoint if is_checkpoint_needed else 0)
    if free is not None and free + freed < needed:
        writes = "an adapter and a checkpoint" if is_checkpoint_needed else "the adapter"
        raise ValueError(
            f"--output-dir {config.output_dir} has {free + freed:,} bytes free, {writes} of this run take {needed:,}: "
            "make room or choose another folder" + ("; --save-steps 0 writes no checkpoints" * is_checkpoint_needed)
        )


def room_note(config: TrainConfig, sizes: Sizes, saves: int) -> list[str]:
    """A line where the disk does not hold all checkpoints that the run, which saves so often, will keep."""
    free = free_bytes(Path(config.output_dir))
    # the oldest goes when a newer one has proved fit to go on from
    kept = saves if config.save_total_limit is None else min(saves, config.save_total_limit + 1)
    needed = sizes.adapter + kept * sizes.checkpoint
    if free is None or not config.save_steps or free >= needed:
        return []
    return [
        f"note: {config.output_dir} has {free:,} bytes free, {kept} checkpoints and the adapter take {needed:,}; "
        "checkpoints that do not fit will be left out: bound their number with --save-total-limit"
    ]


def lack_of_room(output_dir: Path, sizes: Sizes) -> str | None:
    """Why a checkpoint cannot be written now with the adapter fitting beside it; None where both fit."""
    free, needed = free_bytes(output_dir), sizes.adapter + sizes.unfinished_checkpoint
    if free is None or free >= needed:
        return None
    return f"{output_dir} has {free:,} bytes free, a checkpoint and the adapter take {needed:,}"
