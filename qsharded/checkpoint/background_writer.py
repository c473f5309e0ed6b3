"""Checkpoints written beside the training: the loop waits for a copy to host memory, a thread does the rest.

Ranks do not wait for each other in a collective, which would run across the training's own. Each writes its files into
a folder called ``.partial`` and then says so by a small one; the main rank's thread waits for those, completes the
checkpoint and renames the folder. So a folder without that ending is complete at any moment, whatever is killed.
"""

import errno
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from qsharded.checkpoint.adapter import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, peft_config
from qsharded.checkpoint.base_identity import base_metadata
from qsharded.checkpoint.files import FileRecord, write_bytes, write_json, write_tensors
from qsharded.checkpoint.host_copies import HostCopies, mark_stream
from qsharded.checkpoint.initial_adapter import copy_initial, initial_metadata
from qsharded.checkpoint.manifest import Manifest, write_manifest
from qsharded.checkpoint.resume import ADAPTER, OPTIMIZER, PARTIAL, STATE_FILE, Progress, checkpoint_folder
from qsharded.checkpoint.retention import drop_old_checkpoints, drop_partial_checkpoints
from qsharded.checkpoint.training_state import RankTensors, Rows, opened, own_state, own_weights
from qsharded.distributed.agreement import first_error, found_by_main
from qsharded.distributed.world import World
from qsharded.lora.config import LoRAConfig
from qsharded.utils.durable_files import sync_folder
from qsharded.utils.strict_json import without_nan
from qsharded.utils.untrusted_json import read_json

_WEIGHTS = "weights"
# For the slowest rank's disk, once the main rank's own files are written. All ranks write alike, so one that is minutes
# behind has a broken disk or another folder; half of NCCL's 10 minutes, so that this is what the user reads, and no
# time-out of ranks that wait for the main one in a collective.
_PATIENCE_S = 300
_POLL_S = 0.05
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointNotWritten(RuntimeError):
    """A checkpoint could not be written; the message says which, and why."""


class _Abandoned(CheckpointNotWritten):
    """The run has ended with an error of its own while the main rank waited for the others' files."""


@dataclass(frozen=True)
class _Job:
    """What this rank writes of a checkpoint: its tensors by kind of file, on the host once ``copied`` is reached."""

    folder: Path
    tensors: Mapping[str, RankTensors]
    copied: torch.cuda.Event | None
    progress: Mapping[str, Any]
    adapter_config: Mapping[str, Any]
    beside_adapter: Mapping[str, bytes]

    @property
    def partial(self) -> Path:
        return self.folder.with_name(self.folder.name + PARTIAL)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Every rank has one and calls it in the same steps.

    An error of the thread is raised by the next call, or at the end: leaving the context waits for the last checkpoint.
    A full disk is no reason to lose the training, though: but for :meth:`wait`, that is printed, and it goes on.

    Args:
        output_dir: of the run, on a file system that all ranks see.
        world: the ranks.
        keep: how many checkpoints stay, the newest, and until the newest is proved (see ``retention``) the newest that
            is; None keeps all.
        refusal: why no checkpoint is written of such a progress, or None; the main rank asks it.
        card: the text of an adapter's README.md, of its adapter_config.json and steps, or None for none; its thread
            asks it.
    """

    def __init__(
        self,
        output_dir: Path,
        world: World,
        keep: int | None,
        refusal: Callable[[Progress], str | None] = lambda progress: None,
        card: Callable[[Mapping[str, Any], int], str | None] = lambda adapter, step: None,
    ) -> None:
        self._output_dir, self._world, self._keep = output_dir, world, keep
        self._refusal, self._card = refusal, card
        output_dir.mkdir(parents=True, exist_ok=True)
        self._unproved: int | None = None  # the applied steps of the newest checkpoint, until it is proved
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._abandoned = threading.Event()
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandoned.set()  # it may be that of a rank whose files will never come
        try:
            self.wait()
        except _Abandoned:
            pass
        except Exception as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr)  # the error on its way is the one that is raised
        finally:
            self._thread.shutdown()

    def save(
        self,
        model: nn.Module,
        lora: LoRAConfig,
        optimizer: Optimizer,
        progress: Progress,
        *,
        base_model: str,
        revision: str | None = None,
        beside_adapter: Mapping[str, bytes] | None = None,
    ) -> str | None:
        """Have a checkpoint written of what everything is now. All ranks first wait for the one before.

        ``beside_adapter``: more files for the adapter's folder, by their names.

        Returns None, or why none is written, on all ranks: what ``refusal`` has said.

        Raises:
            CheckpointNotWritten: the one before could not be written; on all ranks.
        """
        self._wait_for_all()
        refused = found_by_main(self._world, partial(self._look_for_refusal, progress))
        if refused is not None:
            return refused
        rank = self._world.rank
        tensors = {
            _WEIGHTS: self._copied(_WEIGHTS, own_weights(model, rank)),
            OPTIMIZER: self._copied(OPTIMIZER, own_state(model, optimizer, rank)),
        }
        job = _Job(
            checkpoint_folder(self._output_dir, progress.step),
            tensors,
            mark_stream(self._world.device),
            without_nan(asdict(progress)),
            peft_config(model, lora, base_model, revision),
            beside_adapter or {},
        )
        self._pending = self._thread.submit(self._write, job)
        self._unproved = progress.applied_steps
        return None

    def _wait_for_all(self) -> None:
        """Not in the next collective of training, which has a time-out, while a disk is slow."""
        failed: CheckpointNotWritten | None = None
        try:
            self.settle()
        except CheckpointNotWritten as error:
            failed = error
        if said := first_error(self._world, failed):
            raise CheckpointNotWritten(said) from failed

    def _look_for_refusal(self, progress: Progress) -> str | None:
        """No rank writes now, so what is left of a checkpoint that failed can go, and makes room."""
        try:
            drop_partial_checkpoints(self._output_dir)
            return self._refusal(progress)
        except OSError as error:
            return str(error)

    def _copied(self, kind: str, tensors: RankTensors) -> RankTensors:
        copy = self._copies.copy
        held = tensors.parameters.items()
        return RankTensors({n: Rows(r.start, r.stop, copy(f"{kind} {n}", r.tensors)) for n, r in held})

    def check(self, applied_steps: int | None = None) -> None:
        """Raise the error of a checkpoint that could not be written meanwhile.

        Where steps that changed the weights, so many since the run's start, prove the newest checkpoint, the older one
        that was kept in its stead goes.
        """
        if self._pending is not None and self._pending.done():
            self.settle()
        if self._pending is None and applied_steps is not None:
            self._drop_if_proved(applied_steps)

    def _drop_if_proved(self, applied_steps: int) -> None:
        if self._unproved is not None and applied_steps > self._unproved:
            self._unproved = None
            if self._world.is_main:
                self._pending = self._thread.submit(self._drop_old, applied_steps)

    def keep_newest(self) -> None:
        """At a run's good end: no more checkpoints stay than were asked for, proved or not."""
        if self._world.is_main:
            self._drop_old(None)

    def settle(self) -> None:
        """Wait as :meth:`wait` does, but have it printed that the disk is full: an older checkpoint is still there."""
        try:
            self.wait()
        except CheckpointNotWritten as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_ROOM):
                raise
            self._unproved = None
            print(f"warning: {error}. Training goes on without it: make room", file=sys.stderr)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, job: _Job) -> None:
        try:
            self._write_own_files(job)
            if self._world.is_main:
                self._complete(job)
        except CheckpointNotWritten:
            raise
        except Exception as error:
            raise CheckpointNotWritten(f"checkpoint {job.folder} was not written: {error}") from error
        if self._world.is_main:
            self._drop_old(job.progress["step"] - job.progress["skipped_steps"])

    def _drop_old(self, applied_steps: int | None) -> None:
        """The new one is complete, so training goes on where an old one cannot be deleted."""
        try:
            drop_old_checkpoints(self._output_dir, self._keep, applied_steps)
        except OSError as error:
            print(f"an old checkpoint was not deleted: {error}", file=sys.stderr)

    def _write_own_files(self, job: _Job) -> None:
        if job.copied is not None:
            job.copied.synchronize()
        job.folder.parent.mkdir(exist_ok=True)  # not its parents: an output folder that was moved stays away
        job.partial.mkdir(exist_ok=True)
        names = {kind: _tensor_file(kind, self._world.rank, self._world.size) for kind in job.tensors}
        records = {names[kind]: tensors.write(job.partial / names[kind]) for kind, tensors in job.tensors.items()}
        # the main rank may read it from now on
        said = {name: asdict(record) for name, record in records.items()}
        write_json(job.partial / _rank_file(self._world.rank), said)

    def _complete(self, job: _Job) -> None:
        """Make a checkpoint of what all ranks have written. The main rank's."""
        files = self._records_of_all(job)
        weights = [name for name in files if name.startswith(_WEIGHTS)]
        card = self._card(job.adapter_config, job.progress["step"])
        files |= _write_adapter(job, weights, card)
        files[STATE_FILE] = write_json(job.partial / STATE_FILE, job.progress)
        for name in [*weights, *map(_rank_file, range(self._world.size))]:
            (job.partial / name).unlink()
        kept = {name: record for name, record in files.items() if name not in weights}
        write_manifest(job.partial, Manifest(job.progress["step"], self._world.size, kept))
        job.partial.rename(job.folder)
        sync_folder(job.folder.parent)

    def _records_of_all(self, job: _Job) -> dict[str, FileRecord]:
        records: dict[str, FileRecord] = {}
        deadline = time.monotonic() + _PATIENCE_S
        for rank in range(self._world.size):
            path = job.partial / _rank_file(rank)
            while not path.is_file():
                if self._abandoned.is_set():
                    raise _Abandoned(job.folder)
                if time.monotonic() > deadline:
                    raise CheckpointNotWritten(
                        f"checkpoint {job.folder} was not written: rank {rank} did not write {path}"
                    )
                time.sleep(_POLL_S)
            records |= {name: FileRecord(**record) for name, record in read_json(path).items()}
        return records


def _write_adapter(job: _Job, weights: list[str], card: str | None) -> dict[str, FileRecord]:
    """Join the ranks' rows into an adapter in PEFT's format, with its card."""
    folder = job.partial / ADAPTER
    folder.mkdir(exist_ok=True)
    with opened(job.partial, weights) as written:
        initial = job.progress["initial"]
        metadata = {"format": "pt"} | base_metadata(job.progress["base"]) | initial_metadata(initial)
        tensors = write_tensors(folder / WEIGHTS_FILE, written.whole_tensors("weight"), metadata)
    described = write_json(folder / CONFIG_FILE, job.adapter_config)
    beside = copy_initial(job.folder.parent.parent, folder, initial)
    files = {WEIGHTS_FILE: tensors, CONFIG_FILE: described} | beside
    if card is not None:
        files[CARD_FILE] = write_bytes(folder / CARD_FILE, [card.encode()])
    files |= {name: write_bytes(folder / name, [content]) for name, content in job.beside_adapter.items()}
    return {f"{ADAPTER}/{name}": record for name, record in files.items()}


def _tensor_file(kind: str, rank: int, size: int) -> str:
    return f"{kind}-{rank:05d}-of-{size:05d}.safetensors"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"
