"""What a run calibrates on its own training rows before its first step: its base, and where its adapters begin."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qsharded.calibration.adapters import start_from_residual
from qsharded.calibration.checkpoint import calibrate_checkpoint, weights_hash, write_packed
from qsharded.calibration.method import Calibration
from qsharded.calibration.rows import CalibrationRows, rows_of_parts
from qsharded.checkpoint.adapter import stored_name
from qsharded.checkpoint.fingerprint import is_packed
from qsharded.checkpoint.load import Outline
from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.command import compute_dtype
from qsharded.cli.output_folder import complete_or_absent
from qsharded.config import TrainConfig
from qsharded.data import Example, Mixture
from qsharded.data.cache import default_folder
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.lora.layer import lora_layers
from qsharded.models import CausalLM
from qsharded.quant.formats import NF4_64
from qsharded.utils import heartbeat
from qsharded.utils.sharding import local, own_rows

USUAL_ROWS = 32
_ROUNDED = "linear layers and experts"  # what a base of the cache has calibrated: older ones lack the experts


@heartbeat.working_outside("calibrating the base")
def calibrated_base(config: TrainConfig, world: World, folder: Path, data: Mixture, vocab_size: int) -> Path:
    """The packed checkpoint of ``folder``, calibrated on training rows: made once, beside the cache of datasets.

    Every rank calls this.

    Raises:
        ValueError: ``folder`` is packed already, or damaged; too few rows; ranks that do not see the cache.
    """
    rows = _rows(config, data, config.calibrate, vocab_size)
    key = found_by_main(world, lambda: _key(folder, rows, world))
    cache = Path(config.data_cache) if config.data_cache else default_folder()
    target = cache / f"calibrated-{key}"
    if not found_by_main(world, target.is_dir):
        how = Calibration("compensated", NF4_64, world.group)
        dtype = compute_dtype(config.dtype, world.device)
        unfinished = target.with_name(f".{target.name}")
        made = calibrate_checkpoint(folder, rows, how, unfinished, world.device, dtype)
        if world.is_main:
            with complete_or_absent(target) as new:
                write_packed(folder, new, "qsharded", world.device, NF4_64, made)
            made.store.remove()
        world.barrier()
    if not target.is_dir():
        raise ValueError(f"rank {world.rank} does not see {target}: give --data-cache a folder that all nodes share")
    return target


def _key(folder: Path, rows: CalibrationRows, world: World) -> str:
    parts = weights_hash(folder), rows.fingerprint, world.device.type, str(world.size), _ROUNDED
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


@heartbeat.working_outside("starting adapters from the rounding's error")
def residual_adapters(
    config: TrainConfig, world: World, outline: Outline, given: Path, data: Mixture
) -> dict[str, Tensor]:
    """What the adapters of ``outline`` begin with, by their names in an adapter file. Every rank calls this.

    ``given``: the folder of ``--model``, whatever ``outline`` was packed into since.

    Raises:
        ValueError: there are no weights in 16 bits, or they are others; too few rows.
    """
    if config.original_model is None and is_packed(given):
        raise ValueError(
            f"--lora-init residual needs the weights in 16 bits that {given} was packed from: give --original-model"
        )
    original = world.first_on_node(lambda: find_checkpoint(config.original_model or given))
    rows = _rows(config, data, config.calibrate or USUAL_ROWS, outline.model.config.vocab_size)
    dtype = compute_dtype(config.dtype, world.device)
    return start_from_residual(
        outline.model, outline.packed, original, rows, world.device, dtype, seed=config.seed, group=world.group
    )


def fill_adapters(model: CausalLM, tensors: dict[str, Tensor]) -> None:
    """Put them into a model that is in memory, each rank its own rows."""
    for name, layer in lora_layers(model):
        for part, parameter in layer.updates().items():
            rows = own_rows(parameter)
            local(parameter).data.copy_(tensors[stored_name(model, f"{name}.{part}")][rows.start : rows.stop])


def _rows(config: TrainConfig, data: Mixture, count: int, vocab_size: int) -> CalibrationRows:
    """Of the run's length, or shorter where a dataset is too small."""
    parts = {name: part.examples for name, part in data.parts.items()}
    share = -(-count // len(parts))
    length = min(config.max_length, *(max(2, _tokens(part) // share) for part in parts.values()))
    return rows_of_parts(parts, count, length, vocab_size)


def _tokens(examples: Sequence[Example]) -> int:
    return sum(map(len, examples))
