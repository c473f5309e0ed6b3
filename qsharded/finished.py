"""A run that has reached its end says so in its folder, so that the same command, started again, has nothing to do."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qsharded.checkpoint.adapter import WEIGHTS_FILE
from qsharded.checkpoint.files import sync_folder, write_json
from qsharded.checkpoint.source import read_json
from qsharded.checkpoint.training import ADAPTER, Progress, checkpoints
from qsharded.config import TrainConfig
from qsharded.parallel import World

FINISHED_FILE = "finished.json"
# They do not say which adapter is trained, but where and how often a run reports and saves, how it starts and stops,
# and how it fits into memory.
_WITHOUT_EFFECT = {
    "sharding", "dp_replicate", "cpu_offload", "activation_checkpointing",
    "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "exit_code_when_stopped", "eval_dataset", "eval_dataset_split", "eval_steps", "per_device_eval_batch_size",
    "exact_match_dataset", "dry_run", "gpus", "gpu_memory_gib",
}  # fmt: skip


class AlreadyFinished(Exception):
    """The run that is to be resumed has been trained to its end; the message says so."""


def mark_finished(config: TrainConfig, progress: Progress) -> None:
    """Write into the output folder that the run is at its end. To be called once all else is on the disk."""
    folder = Path(config.output_dir)
    beside = folder / f"{FINISHED_FILE}.new"
    write_json(beside, _run(config, progress.settings) | {"steps": progress.step})
    beside.replace(folder / FINISHED_FILE)
    sync_folder(folder)


def is_marked(folder: Path) -> bool:
    """Whether ``folder`` holds a run that has reached its end."""
    return (folder / FINISHED_FILE).is_file()


def end_if_finished(
    config: TrainConfig, world: World, resume_from: Path | None, settings: Mapping[str, Any], total_steps: int
) -> None:
    """Compare this run with the one that reached its end in the same folder, where "auto" is to resume it.

    Raises, on every rank:
        AlreadyFinished: it is the same run.
        ValueError: it is another one, and has left no checkpoint to go on from.
    """
    if config.resume_from_checkpoint != "auto":
        return
    # The main rank looks: nodes need not share the folder.
    verdict = [
        _verdict(config, resume_from, _run(config, settings) | {"steps": total_steps}) if world.is_main else None
    ]
    if world.mesh is not None:
        dist.broadcast_object_list(verdict, src=0, group=world.patient)
    if verdict[0] is not None:
        raise verdict[0]


def _verdict(config: TrainConfig, resume_from: Path | None, now: Mapping[str, Any]) -> Exception | None:
    folder = Path(config.output_dir)
    adapter = folder / ADAPTER
    if not is_marked(folder) or not (adapter / WEIGHTS_FILE).is_file():
        return None
    marked = _read(folder / FINISHED_FILE)
    differs = [key for key, value in now.items() if marked.get(key) != value]
    if not differs and resume_from in (None, *checkpoints(folder)[-1:]):  # a newer one was damaged: it is made again
        return AlreadyFinished(
            f"the run in {folder} is finished: {now['steps']} of {now['steps']} steps, the adapter is in {adapter}. "
            "Nothing to do; to train anew, choose another --output-dir"
        )
    if resume_from is None and not config.overwrite_output_dir:
        key = differs[0]
        return ValueError(
            f"{folder} holds an earlier run (adapter), which is finished, of other settings ({key} = "
            f"{marked.get(key)!r}, this run has {now[key]!r}), and no checkpoint to go on from; choose another "
            "--output-dir, or replace it with --overwrite-output-dir"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError:
        return {}  # damaged: then it says nothing


def _run(config: TrainConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it the same run, as JSON gives it back."""
    options = {name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT}
    return json.loads(json.dumps(options | dict(settings)))
