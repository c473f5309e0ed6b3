"""What a run is made from, recorded in its checkpoints; and whether a run that goes on from one is made from the same.

Rows and base weights must be the same, wherever they lie, and so must what decides the order of rows. Options that
change the mathematics of the steps to come may be others: they are listed. :mod:`qsharded.config.resume_roles` says
which option is what.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsharded.checkpoint.base_identity import BaseIdentity, CannotTell
from qsharded.checkpoint.manifest import read_manifest
from qsharded.checkpoint.resume import ADAPTER, Progress, read_progress, refuse_other
from qsharded.cli.command import compute_dtype
from qsharded.config import TrainConfig
from qsharded.config.resume_roles import PATHS, options_of
from qsharded.data import Mixture, Tokenizer
from qsharded.data.fingerprint import RowsFingerprint
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.utils import collectives

_DERIVED = ("rows_per_step", "moments")


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from: where the run stood, and how many ranks wrote it."""

    folder: Path
    progress: Progress
    ranks: int

    @classmethod
    def read(cls, folder: Path | None, world: World) -> "Resumed | None":
        """The one in ``folder``, the same on every rank; None where there is none.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        return None if folder is None else found_by_main(world, lambda: cls._of(folder))

    @classmethod
    def _of(cls, folder: Path) -> "Resumed":
        progress = read_progress(folder)
        progress.skipped_before = progress.skipped_steps  # --max-skipped-steps counts anew
        return cls(folder, progress, read_manifest(folder).world_size)


def kept_accumulation(config: TrainConfig, ranks: int, resumed: Resumed | None) -> tuple[int, str]:
    """Micro-batches of a step, and a line where they are others than ``config`` says; else "".

    On another number of ranks, a step keeps its rows where they divide; so it stays when the same command starts the
    run again. Who changes the batch on the same ranks means it, and is refused later, as are rows that do not divide.
    """
    given = config.gradient_accumulation_steps
    settings = resumed.progress.settings if resumed else {}
    rows, at_once = settings.get("rows_per_step"), ranks * config.per_device_train_batch_size
    if resumed is None or rows is None or rows == given * at_once or rows % at_once:
        return given, ""
    if ranks == resumed.ranks and any(settings.get(name) != getattr(config, name) for name in options_of("step")):
        return given, ""
    kept = rows // at_once
    why = f"so that a step keeps its {rows} rows on {ranks} rank{'s' if ranks > 1 else ''}"
    return kept, f"gradient accumulation: {kept} in place of {given}, {why}"


@dataclass(frozen=True)
class Made:
    """What this run is made from. The fingerprint of its base is taken by the main rank alone."""

    config: TrainConfig
    rows_per_step: int
    data: Mixture
    tokenizer: Tokenizer
    checkpoint: Path

    def progress(self, world: World, resumed: Resumed | None) -> tuple[Progress, list[str]]:
        """Where the run stands, with what it is made from, and lines to show. Every rank calls this.

        Raises:
            ValueError: ranks have read other rows, or ``resumed`` was made from something else; what differs is said.
        """
        before = resumed.progress.data if resumed else None
        rows = RowsFingerprint.like(self.data.examples, self.tokenizer.files, before)
        _refuse_other_rows_by_rank(rows, world)
        return found_by_main(world, lambda: self._progress(rows, world, resumed))

    def base(self, world: World) -> BaseIdentity:
        """The fingerprint of the base model's weights."""
        if self.config.random_init:
            return BaseIdentity.of_random(self.checkpoint, self.config.seed, world.device)
        return BaseIdentity.of(self.checkpoint)

    def _progress(self, rows: RowsFingerprint, world: World, resumed: Resumed | None) -> tuple[Progress, list[str]]:
        now = Progress(settings=self._settings(world), data=rows.to_json(), base=self.base(world).to_json())
        if resumed is None:
            return now, []
        notes = _compare(resumed, now, self)
        then = resumed.progress
        changed = _told(then.settings, now.settings)
        if changed:
            notes.append(f"changed since the checkpoint: {', '.join(changed)}")
        changes = then.changes + [f"step {then.step}: {change}" for change in changed]
        return replace(then, settings=now.settings, data=now.data, base=now.base, changes=changes), notes

    def _settings(self, world: World) -> dict[str, Any]:
        """What is compared when the run goes on, as JSON gives it back."""
        config = self.config
        options = {name: getattr(config, name) for name in options_of("fixed", "rows", "step", "told")}
        options["dtype"] = str(compute_dtype(config.dtype, world.device)).removeprefix("torch.")
        options["rows_per_step"] = self.rows_per_step
        options["moments"] = "fp32" if config.optim == "adamw" else "8 bits"
        settings: dict[str, Any] = json.loads(json.dumps(options))
        return settings


def _refuse_other_rows_by_rank(rows: RowsFingerprint, world: World) -> None:
    """Each rank reads the dataset by itself: a copy on a node's own disk may be another."""
    found = collectives.all_gather_objects((rows.ids, rows.masks), world.long_timeout_group)
    others = [rank for rank, read in enumerate(found) if read != found[0]]
    if others:
        raise ValueError(
            f"rank {others[0]} has read other training rows than rank 0: give all nodes the same dataset and tokenizer"
        )


def _compare(resumed: Resumed, now: Progress, made: Made) -> list[str]:
    """Refuse what must be the same and is not; returns what could not be checked."""
    folder, then = resumed.folder, resumed.progress
    fixed = [*options_of("fixed"), *_DERIVED]
    if not then.data:
        fixed += [name for name in options_of("rows") if name not in PATHS]
    settings = {name: now.settings[name] for name in fixed if name in then.settings}
    refuse_other(settings, then.settings, folder)
    if not then.data or not then.base:
        return [
            f"note: {folder} was written by a version that kept no fingerprints: whether dataset, base model and "
            "learning rate and the like are the same could not be checked"
        ]
    _refuse_other_rows(then, now, folder)
    return _base_notes(then, now, folder, made)


def _refuse_other_rows(then: Progress, now: Progress, folder: Path) -> None:
    before, after = RowsFingerprint.from_json(then.data), RowsFingerprint.from_json(now.data)
    different = before.difference(after)
    if different:
        why = _reason(then.settings, now.settings, before.changed_tokenizer_files(after))
        raise ValueError(f"{folder} was trained on other rows: {different}; {why}. Resume with the rows it began with")


def _reason(then: Mapping[str, Any], now: Mapping[str, Any], files: Sequence[str]) -> str:
    """What most likely made the rows others."""
    if now["streaming"] and then.get("max_steps") != now["max_steps"]:
        steps = f"--max-steps was {then.get('max_steps')}, is {now['max_steps']}"
        return f"{steps}, which says how many rows --streaming reads"
    options = [f"{_flag(n)} was {then[n]}, is {now[n]}" for n in options_of("rows") if then.get(n, now[n]) != now[n]]
    if options:
        return ", ".join(options)
    if files:
        return f"the tokenizer's {' and '.join(files)} changed (template or tokens)"
    return "options and tokenizer are the same, so the dataset's content changed"


def _base_notes(then: Progress, now: Progress, folder: Path, made: Made) -> list[str]:
    model = made.config.model
    try:
        different = BaseIdentity.from_json(then.base).difference(BaseIdentity.from_json(now.base), made.checkpoint)
    except CannotTell as why:
        return [f"note: whether {folder} was trained on the weights of --model {model} could not be checked: {why}"]
    if different:
        raise ValueError(
            f"{folder} was trained on another base model than --model {model}: {different}. Resume on the one it began "
            f"with, or start a new run from its adapter with --adapter {folder / ADAPTER} --allow-other-base"
        )
    return []


def _told(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in options_of("told") if name in then and then[name] != now[name]]
    return [f"{_flag(name)} {then[name]} -> {now[name]}" for name in names]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
