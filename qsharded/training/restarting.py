"""torchrun starts all ranks anew when one fails: then the run in the output folder is this one, not an earlier one."""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsharded.checkpoint.resume import checkpoints
from qsharded.config import TrainConfig
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.report.run_files import RECORD_FILE
from qsharded.training.finished import is_marked
from qsharded.training.run_record import starter
from qsharded.utils.process_identity import ProcessIdentity
from qsharded.utils.untrusted_json import read_json

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def after_restart(config: TrainConfig, world: World) -> TrainConfig:
    """``config``, or where torchrun has started this run before, one that goes on from its newest checkpoint, or
    starts afresh where there is none yet. Every rank calls this; the main rank looks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return config
    return found_by_main(world, partial(_after_restart, config))


def _after_restart(config: TrainConfig) -> TrainConfig:
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(OWN_STORE) != "1":
        _say(config, f"warning: restarts by torchrun can hang in PyTorch's rendezvous; start it with {OWN_STORE}=1")
    folder = Path(config.output_dir)
    if not _is_restart(folder):
        return config
    if checkpoints(folder) or is_marked(folder):
        _say(config, "started again by torchrun: going on from the newest checkpoint")
        return replace(config, resume_from_checkpoint="auto", overwrite_output_dir=False)
    _say(config, "started again by torchrun before the first checkpoint: starting afresh")
    return replace(config, overwrite_output_dir=True)


def _say(config: TrainConfig, line: str) -> None:
    print(f"{config.prog}: {line}", file=sys.stderr, flush=True)


def _is_restart(folder: Path) -> bool:
    """Whether another process that the same torchrun started has taken the folder.

    Its count of restarts would not tell: a first start that was refused, as the folder holds an earlier run, is
    followed by one too.
    """
    try:
        record = read_json(folder / RECORD_FILE)
    except (ValueError, OSError):
        return False
    started_by = record.get("started_by")
    others = record.get("main") != ProcessIdentity.of(os.getpid()).to_json()
    return isinstance(started_by, list) and starter().to_json() in started_by and others
