"""A run that has reached its end says so in its folder, so that the same command, started again, has nothing to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsharded.checkpoint.adapter import WEIGHTS_FILE
from qsharded.checkpoint.files import write_json
from qsharded.checkpoint.resume import ADAPTER, Progress, checkpoints
from qsharded.config import TrainConfig
from qsharded.config.resume_roles import PATHS, options_of
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.report.run_files import FINISHED_FILE
from qsharded.utils.untrusted_json import read_json

_PATIENCE = "early_stopping_patience"


class AlreadyFinished(Exception):
    """The run that is to be resumed has been trained to its end; the message says so."""


def mark_finished(config: TrainConfig, progress: Progress, total_steps: int) -> None:
    """Write into the output folder that the run is at its end. To be called once the adapter is on the disk.

    Of a run that has ended before ``total_steps``, as its patience was out, it says so: with more patience it goes on.

    Raises:
        NotWritten: it could not be.
    """
    mark = _run(config, progress, total_steps)
    if progress.step < total_steps:
        mark |= {"stopped_early": progress.step, _PATIENCE: config.early_stopping_patience}
    write_json(Path(config.output_dir, FINISHED_FILE), mark)


def is_marked(folder: Path) -> bool:
    """Whether ``folder`` holds a run that has reached its end."""
    return (folder / FINISHED_FILE).is_file()


def end_if_finished(
    config: TrainConfig, world: World, resume_from: Path | None, progress: Progress, total_steps: int
) -> None:
    """Compare this run, made as ``progress`` says, with the one that reached its end in the same folder, where "auto"
    is to resume it. Every rank calls this; the main one looks, for nodes need not share the folder.

    Raises:
        AlreadyFinished: it is the same run.
        ValueError: it is another one, and has left no checkpoint to go on from.
    """
    if config.resume_from_checkpoint == "auto":
        end = found_by_main(world, lambda: _end(config, resume_from, _run(config, progress, total_steps)))
        if end is not None:
            raise AlreadyFinished(end)


def _end(config: TrainConfig, resume_from: Path | None, now: Mapping[str, Any]) -> str | None:
    """What to say of the run if it is at its end."""
    folder = Path(config.output_dir)
    adapter = folder / ADAPTER
    if not is_marked(folder) or not (adapter / WEIGHTS_FILE).is_file():
        return None
    marked = _read(folder / FINISHED_FILE)
    if "stopped_early" in marked:
        now = {**now, _PATIENCE: config.early_stopping_patience}
    differs = [key for key, value in now.items() if marked.get(key) != value]
    if not differs and resume_from in (None, *checkpoints(folder)[-1:]):  # a newer one was damaged: it is made again
        return (
            f"the run in {folder} is finished: {_done(marked)} of {now['steps']} steps, the adapter is in {adapter}. "
            "Nothing to do; to train anew, choose another --output-dir"
        )
    if resume_from is None and not config.overwrite_output_dir:
        key = differs[0]
        raise ValueError(
            f"{folder} holds an earlier run (adapter), which is finished, of other settings ({key} = "
            f"{marked.get(key)!r}, this run has {now[key]!r}), and no checkpoint to go on from; choose another "
            "--output-dir, or replace it with --overwrite-output-dir"
        )
    return None


def _done(marked: Mapping[str, Any]) -> str:
    early = marked.get("stopped_early")
    return (
        str(marked["steps"]) if early is None else f"ended early, as --early-stopping-patience was out, after {early}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError:
        return {}  # damaged: then it says nothing


def _run(config: TrainConfig, progress: Progress, steps: int) -> dict[str, Any]:
    """What makes it the same run, as JSON gives it back: rows and base weights by fingerprints, not by their paths."""
    settings = {name: value for name, value in progress.settings.items() if name not in PATHS}
    adapter = {name: getattr(config, name) for name in ("adapter", *options_of("adapter"))}
    made_from = {"data": progress.data, "base": progress.base}
    run: dict[str, Any] = json.loads(json.dumps({"steps": steps, **settings, **adapter, **made_from}))
    return run
