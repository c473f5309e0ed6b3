"""Checkpoints of a run: where they lie, and how a run goes on from one.

A checkpoint is a folder of ``manifest.json``, ``state.json``, ``adapter/`` in PEFT's format, and the optimizer's state,
a file for each rank that wrote it. :mod:`qsharded.checkpoint.background_writer` writes them,
:mod:`qsharded.checkpoint.intact` tells which are fit to go on from, :mod:`qsharded.checkpoint.retention` which stay.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from qsharded.checkpoint.adapter import CONFIG_FILE, load_adapter, peft_config
from qsharded.checkpoint.manifest import read_manifest
from qsharded.checkpoint.training_state import load_state, opened
from qsharded.lora.config import LoRAConfig
from qsharded.utils.untrusted_json import read_json

STATE_FILE, ADAPTER, OPTIMIZER = "state.json", "adapter", "optimizer"
_MEANING = {
    "rows_per_step": " (ranks x --per-device-train-batch-size x --gradient-accumulation-steps)",
    "moments": " (fp32: --optim adamw; 8 bits: adamw8bit, paged_adamw8bit)",
}
PARTIAL = ".partial"  # ends the name of a folder that is being written, or deleted


@dataclass
class Progress:
    """Where a run stands; with adapter and optimizer state, all that an identical continuation needs.

    Random numbers need no state of their own: each step draws from a generator seeded by (seed, step, rank). Nor does
    the learning rate, which the step and the run's options give.

    Attributes:
        step: optimizer steps tried, the skipped ones included.
        epoch, row: the data's cursor.
        skipped_steps: steps left out for a gradient that was not finite.
        skipped_before: those of them before the run was last resumed, which ``--max-skipped-steps`` does not count.
        window: what has been summed since the last log line; NaN, after a skipped step, is null in the file.
        settings: the options that matter when a run goes on; :mod:`qsharded.config.resume_roles` says how.
        data, base: fingerprints of the rows and of the base weights; empty where an older version wrote them.
        initial: the hash of the file that holds what the adapter began with; "" where that was no change.
        changes: of options, each with the step from which it holds.
        best: the best evaluation so far, as ``training.best`` keeps it; empty where none is compared.
    """

    step: int = 0
    epoch: int = 0
    row: int = 0
    skipped_steps: int = 0
    window: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    skipped_before: int = 0
    initial: str = ""

    @property
    def skipped_since_start(self) -> int:
        """Steps left out since the run was started or resumed."""
        return self.skipped_steps - self.skipped_before

    @property
    def applied_steps(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.skipped_steps


def load_checkpoint(folder: Path, model: nn.Module, lora: LoRAConfig, optimizer: Optimizer) -> None:
    """Fill adapter and optimizer from ``folder``, each rank its own rows.

    The number of ranks may be another than the one that wrote it.

    Raises:
        ValueError: a file that is missing, damaged, or of another model; an adapter of other settings than ``lora``.
    """
    adapter = read_json(folder / ADAPTER / CONFIG_FILE)
    # another base is told by its fingerprint, another dropout is the user's to choose
    leave = {"base_model_name_or_path", "revision", "lora_dropout"}
    refuse_other(peft_config(model, lora, ""), adapter, folder, leave)
    load_adapter(model, folder / ADAPTER)
    files = [name for name in read_manifest(folder).files if name.startswith(OPTIMIZER)]
    with opened(folder, files) as written:
        load_state(model, optimizer, written)


def refuse_other(now: Mapping[str, Any], then: Mapping[str, Any], folder: Path, leave: Container[str] = ()) -> None:
    """Raise ValueError where ``then``, of the checkpoint in ``folder``, has another value than ``now``."""
    for key, value in now.items():
        if key not in leave and then.get(key) != value:
            raise ValueError(
                f"{folder} was written with {key} = {then.get(key)!r}, this run has {value!r}: resume it alike"
                + _MEANING.get(key, "")
            )


def read_progress(folder: Path) -> Progress:
    """Where the run stood that wrote the checkpoint in ``folder``.

    Raises:
        ValueError: the file is missing, damaged, or of another version.
    """
    path = folder / STATE_FILE
    try:
        progress = Progress(**read_json(path))
        progress.window = {key: math.nan if value is None else value for key, value in progress.window.items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not of this version: {error}") from None
    return progress


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; one that was renamed is the user's, and not among them."""
    try:
        found = list((output_dir / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in found if has_step_name(path) and path.is_dir()), key=step_of)


def has_step_name(checkpoint: Path) -> bool:
    """Whether the folder is called as the writer calls it: step- and a number."""
    return checkpoint.name.startswith("step-") and _number(checkpoint).isdecimal()


def step_of(checkpoint: Path) -> int:
    """The step of one of ``checkpoints``, by its folder's name."""
    return int(_number(checkpoint))


def _number(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("step-")
