"""What trains, and its optimizer state, in runs of rows: each rank writes those it holds, any number of ranks reads.

A file has the tensors of one rank. Its metadata says which rows [start, stop) of each parameter they are of, so that
neither the number of ranks nor the way they cut the rows has to be the same again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from qsharded.checkpoint.adapter import open_weights, trainable
from qsharded.checkpoint.files import FileRecord, TensorParts, write_tensors
from qsharded.utils.sharding import local, own_rows

_ROWS = "rows"


@dataclass(frozen=True)
class Rows:
    """Tensors that belong to the rows [start, stop) of a parameter, by what they are called."""

    start: int
    stop: int
    tensors: Mapping[str, Tensor]


@runtime_checkable
class WritesItsState(Protocol):
    """An optimizer whose state is not made of tensors of a parameter's shape (8-bit codes, say) and whole ones.

    It says itself what is written of a parameter, and takes it back from whatever runs of rows it was written in.
    """

    def parameter_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """The state of this rank's rows: any tensors, on any device. Empty before the first step."""

    def set_parameter_state(self, parameter: Tensor, written: Sequence[Rows]) -> None:
        """Take the state of this rank's rows out of ``written``, what :meth:`parameter_state` gave, on the CPU:
        the one run of rows that holds all of them, or else every run of the parameter, in order.
        """


@dataclass
class RankTensors:
    """What one rank writes into one file: for each parameter that it holds, some of its rows and tensors of these."""

    parameters: dict[str, Rows] = field(default_factory=dict)

    def write(self, path: Path) -> FileRecord:
        """Write all of it to ``path``; the tensors must be on the CPU."""
        held = self.parameters.items()
        tensors = {_key(name, label): value for name, rows in held for label, value in rows.tensors.items()}
        ranges = {name: [rows.start, rows.stop] for name, rows in held}
        parts = {key: TensorParts(value.dtype, tuple(value.shape), [value]) for key, value in tensors.items()}
        return write_tensors(path, parts, {_ROWS: json.dumps(ranges)})


def _key(name: str, label: str) -> str:
    """Of the tensor of parameter ``name`` that is its "weight", or is called ``label`` in the optimizer's state."""
    return f"{name}:{label}"


def own_weights(model: nn.Module, rank: int) -> RankTensors:
    """The rows of what trains that this rank is to write."""
    return RankTensors({n: _rows(p, {"weight": local(p.detach())}) for n, p in _written_by(rank, model)})


def own_state(model: nn.Module, optimizer: Optimizer, rank: int) -> RankTensors:
    """The optimizer's state of those rows, and what of it is no rows: a step count."""
    return RankTensors({n: _rows(p, _state(optimizer, p)) for n, p in _written_by(rank, model)})


def _rows(parameter: Tensor, tensors: Mapping[str, Tensor]) -> Rows:
    own = own_rows(parameter)
    return Rows(own.start, own.stop, tensors)


def _state(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    if isinstance(optimizer, WritesItsState):
        return optimizer.parameter_state(parameter)
    state = optimizer.state.get(parameter, {})
    assert all(isinstance(value, Tensor) for value in state.values()), f"{type(optimizer)} keeps more than tensors"
    return {label: local(value) for label, value in state.items()}


def _written_by(rank: int, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in trainable(model) if _is_written_by(rank, parameter))


def _is_written_by(rank: int, parameter: Tensor) -> bool:
    """Of the ranks that hold the same rows, the first writes them."""
    if not isinstance(parameter, DTensor):
        return rank == 0
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    copies = [at for at, kind in zip(coordinate, parameter.placements, strict=True) if not isinstance(kind, Shard)]
    return not any(copies)


@dataclass(frozen=True)
class _Run:
    """Rows [start, stop) of parameter ``name``, and the open file that holds the tensors called ``labels`` of them."""

    name: str
    start: int
    stop: int
    file: Any
    labels: list[str]

    def read(self, label: str) -> Tensor:
        return self.file.get_tensor(_key(self.name, label))

    def slice(self, label: str) -> Any:
        """An object that reads no more than is asked of it."""
        return self.file.get_slice(_key(self.name, label))

    def shape(self, label: str) -> tuple[int, ...]:
        return tuple(self.slice(label).get_shape())

    def dtype(self, label: str) -> torch.dtype:
        """Of a tensor that has rows."""
        return self.slice(label)[:0].dtype

    def all(self) -> Rows:
        return Rows(self.start, self.stop, {label: self.read(label) for label in self.labels})


class WrittenTensors:
    """The files that the ranks of a run wrote, as one."""

    def __init__(self, folder: Path, files: Sequence[Any]) -> None:
        self._folder = folder
        self._runs: dict[str, list[_Run]] = {}
        for file in files:
            self._add(file)
        for runs in self._runs.values():
            runs.sort(key=lambda run: (run.start, run.stop))

    def _add(self, file: Any) -> None:
        labels: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118  not a dict
            name, _, label = key.rpartition(":")
            labels.setdefault(name, []).append(label)
        for name, (start, stop) in json.loads(file.metadata()[_ROWS]).items():
            self._runs.setdefault(name, []).append(_Run(name, start, stop, file, labels.get(name, [])))

    def whole_tensors(self, label: str) -> dict[str, TensorParts]:
        """Each parameter's tensor of that name in whole, to be written to a file."""
        return {name: self._whole(runs, label) for name, runs in self._runs.items()}

    def _whole(self, runs: list[_Run], label: str) -> TensorParts:
        rows = runs[-1].stop
        _check_cover(runs, rows, self._folder)
        return TensorParts(runs[0].dtype(label), (rows, *runs[0].shape(label)[1:]), (run.read(label) for run in runs))

    def runs(self, name: str, rows: int) -> list[_Run]:
        """All that make up the ``rows`` rows of a parameter, in order.

        Raises:
            ValueError: rows that no file holds.
        """
        runs = self._runs.get(name, [])
        if not runs:
            raise ValueError(f"{self._folder} holds nothing of {name}")
        _check_cover(runs, rows, self._folder)
        return runs


def _check_cover(runs: Sequence[_Run], total: int, folder: Path) -> None:
    end = 0
    for run in runs:
        if run.start != end:
            break
        end = run.stop
    if end != total:
        raise ValueError(f"{folder}: rows of {runs[0].name} are missing from row {end} on, or are too many, of {total}")


@contextmanager
def opened(folder: Path, files: Sequence[str]) -> Iterator[WrittenTensors]:
    """Those files of ``folder``, for reading."""
    with ExitStack() as stack:
        yield WrittenTensors(folder, [stack.enter_context(open_weights(folder / file)) for file in files])


def load_state(model: nn.Module, optimizer: Optimizer, written: WrittenTensors) -> None:
    """Fill the optimizer's state of the rows that this rank holds.

    Raises:
        ValueError: rows that were not written.
    """
    for name, parameter in trainable(model):
        runs = written.runs(name, parameter.shape[0])
        if not runs[0].labels:
            continue  # no step has been taken
        if isinstance(optimizer, WritesItsState):
            optimizer.set_parameter_state(parameter, [run.all() for run in _needed(runs, parameter)])
        else:
            optimizer.state[parameter] = {label: _own_value(label, parameter, runs) for label in runs[0].labels}


def _needed(runs: Sequence[_Run], parameter: Tensor) -> Sequence[_Run]:
    own = own_rows(parameter)
    holding_all = [run for run in runs if own.count and run.start <= own.start and own.stop <= run.stop]
    return holding_all or runs


def _own_value(label: str, parameter: Tensor, runs: Sequence[_Run]) -> Tensor:
    """A tensor of the parameter's shape, sharded like it; anything else (a step count) is whole on every rank."""
    first = runs[0]
    if first.shape(label) != (first.stop - first.start, *parameter.shape[1:]):
        return first.read(label)
    value = torch.empty_like(parameter, dtype=first.dtype(label), requires_grad=False)
    own, mine = own_rows(parameter), local(value)
    for run in runs:
        start, stop = max(run.start, own.start), min(run.stop, own.stop)
        if start < stop:
            mine[start - own.start : stop - own.start] = run.slice(label)[start - run.start : stop - run.start]
    return value
