"""``run.json``: what a run was made from, on what and by whom, written when it takes its output folder.

It pins what came from the Hub: a branch or tag can move, a commit cannot.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from qsharded import __version__
from qsharded.checkpoint.files import write_json
from qsharded.checkpoint.resume import Progress
from qsharded.config import TrainConfig
from qsharded.data import Dataset
from qsharded.data.facts import lengths_of, trained_of
from qsharded.data.sources import find_files
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.plan.gpu_memory import Plan
from qsharded.report.run_files import RECORD_FILE
from qsharded.training.datasets import RunData
from qsharded.utils import collectives, environment
from qsharded.utils.hardware import GIB
from qsharded.utils.process_identity import ProcessIdentity
from qsharded.utils.untrusted_json import read_json

_LIBRARIES = ("triton", "transformers")
_OF_A_START = ("started", "versions", "commit", "ranks", "nodes", "gpus", "cpu", "first_step")


@dataclass(frozen=True)
class RunFacts:
    """What the record says of a run beside its options.

    Attributes:
        folder: of the base model.
        model_type: as config.json calls the architecture.
        parameters, trained: of the model, and in the adapters.
        plan: of a GPU's memory; None on CPUs, and where the model cannot be planned.
    """

    folder: Path
    model_type: str
    parameters: int
    trained: int
    data: RunData
    progress: Progress
    total_steps: int
    plan: Plan | None


def write_record(config: TrainConfig, world: World, run: RunFacts) -> None:
    """Write the record into the output folder. Every rank calls this.

    Raises:
        ValueError: the disk did not let it; on every rank.
    """
    ranks = collectives.all_gather_objects(_this_rank(world), world.long_timeout_group)
    found_by_main(world, partial(_write, config, run, ranks))


def starter() -> ProcessIdentity:
    """The process that started this rank: torchrun's agent, which starts it anew after a failure, or a shell."""
    return ProcessIdentity.of(os.getppid())


def _this_rank(world: World) -> dict[str, Any]:
    gpu: dict[str, Any] | None = None
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        gpu = {"name": found.name, "memory_gib": round(found.total_memory / GIB, 1)}
    return {"starter": starter().to_json(), "gpu": gpu}


def _write(config: TrainConfig, run: RunFacts, ranks: Sequence[dict[str, Any]]) -> None:
    path = Path(config.output_dir, RECORD_FILE)
    starters = [rank["starter"] for rank in ranks]
    before = _before(path) if run.progress.step else {}
    record = {
        "id": before.get("id", uuid4().hex),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": _versions(),
        "commit": environment.source_commit(),
        "ranks": len(ranks),
        "nodes": len({(one["host"], one["kernel"]) for one in starters}),
        "gpus": _counted([rank["gpu"] for rank in ranks if rank["gpu"]]),
        "cpu": {"name": environment.processor(), "cores": environment.cores()},
        "main": ProcessIdentity.of(os.getpid()).to_json(),
        "started_by": [one for number, one in enumerate(starters) if one not in starters[:number]],
        "model": {
            "name": config.model,
            "commit": hub_commit(run.folder),
            "type": run.model_type,
            "parameters": run.parameters,
            "trained": run.trained,
        },
        "data": _data(config, run.data),
        "fingerprints": _fingerprints(run.progress),
        "steps": run.total_steps,
        "first_step": run.progress.step,
        "rows_per_step": run.data.loader.rows_per_step,
        "changes": run.progress.changes,
        "plan": _planned(run.plan),
        "earlier_starts": _earlier_starts(before),
    }
    write_json(path, record)


def _versions() -> dict[str, str]:
    versions = {"qsharded": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions | {name: found for name in _LIBRARIES if (found := environment.version(name))}


def _counted(gpus: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one | {"count": gpus.count(one)} for number, one in enumerate(gpus) if one not in gpus[:number]]


def _data(config: TrainConfig, data: RunData) -> list[dict[str, Any]]:
    """Each dataset, with what the Hub's commits of its files are."""
    parts = [
        _described(name, "training", part) | {"commits": _commits(name, config.dataset_split)}
        for name, part in data.train.parts.items()
    ]
    for name, part in data.evaluation.items():
        source = config.eval_sets.get(name, "part of the training data, held out")
        parts.append(_described(source, f"evaluation {name}".strip(), part))
    return parts


def _described(name: str, use: str, data: Dataset) -> dict[str, Any]:
    tokens, trained = (int(of(data.examples).sum()) for of in (lengths_of, trained_of))
    return {"name": name, "use": use, "rows": len(data.examples), "tokens": tokens, "trained_tokens": trained}


def _fingerprints(progress: Progress) -> dict[str, str]:
    """Of what decides a run's result beside its options: two runs with the same ones were given the same."""
    rows = {name: value for name, value in progress.data.items() if name != "tokenizer"}
    parts = {"base weights": progress.base, "rows": rows, "tokenizer": progress.data.get("tokenizer")}
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for name, part in parts.items()
    }


def _planned(plan: Plan | None) -> Mapping[str, float] | None:
    if plan is None:
        return None
    return {"allocated_gib": plan.allocated / GIB, "reserved_gib": plan.reserved / GIB}


def _before(path: Path) -> dict[str, Any]:
    """The record of the run that this one goes on with, if it was in this folder."""
    try:
        return read_json(path)
    except (ValueError, OSError):
        return {}


def _earlier_starts(before: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not before:
        return []
    return [*before.get("earlier_starts", []), {name: before[name] for name in _OF_A_START if name in before}]


def _commits(dataset: str, split: str) -> list[str]:
    return sorted({commit for path in find_files(dataset, split) if (commit := hub_commit(path))})


def hub_commit(path: Path) -> str | None:
    """The Hub's commit of a file or folder in its cache, where snapshots lie under their commits; else None."""
    above = path.absolute().parts
    return next((commit for name, commit in pairwise(above) if name == "snapshots"), None)
