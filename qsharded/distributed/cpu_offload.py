"""Frozen weights in host memory: a decoder layer's are on the device while it runs, the next one's arrive then.

FSDP2's own CPU offload would take adapters and optimizer to the host too, and on one rank it copies in the compute
stream, with nothing beside it. Here FSDP2 is left what trains. A weight travels as bytes, and nothing holds it but the
layer that runs: the layer has to be recomputed in backward, or its saved activations would keep the weights.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qsharded.distributed.vocab_parallel import shard_rows
from qsharded.utils import collectives
from qsharded.utils.sharding import local, own_rows, rows_per_rank

Place = tuple[nn.Module, str]
"""A module and the name of a parameter in it."""


@dataclass(frozen=True)
class _Arrival:
    """A layer's weights on the device, whole, from when ``event`` has come (at once where it is None)."""

    weights: list[nn.Parameter]
    event: torch.cuda.Event | None


class OffloadedWeights:
    """The frozen weights of ``layers``, on the meta device here; each rank's rows are then held in host memory.

    ``forwards`` are the layers' forwards, each in charge of its own weights.
    """

    def __init__(self, layers: Iterable[nn.Module], mesh: DeviceMesh | None) -> None:
        self._places: list[list[Place]] = []
        self.forwards: list[Callable[..., Tensor]] = []
        self._arrived: dict[int, _Arrival] = {}
        self._stream: torch.cuda.Stream | None = None
        for index, layer in enumerate(layers):
            self._places.append(_frozen(layer))
            for module, name in self._places[-1]:
                setattr(module, name, shard_rows(module.get_parameter(name), mesh))
            self.forwards.append(partial(self._run, index, layer.forward))

    def parameters(self) -> list[nn.Parameter]:
        """What belongs into host memory."""
        return [module.get_parameter(name) for places in self._places for module, name in places]

    @torch.compiler.disable  # which weights are there changes from call to call
    def _run(self, index: int, forward: Callable[..., Tensor], x: Tensor, *others: Any, **named: Any) -> Tensor:
        with self.present(index, x.device):
            return forward(x, *others, **named)

    @contextmanager
    def present(self, index: int, device: torch.device) -> Iterator[None]:
        """A layer's weights are in their modules on ``device``, and the next layer's are on their way."""
        arrival = self._arrived.pop(index, None) or self._fetch(index, device)
        following = index + (-1 if _in_backward() else 1)
        if 0 <= following < len(self._places) and following not in self._arrived:
            self._arrived[following] = self._fetch(following, device)
        if arrival.event is not None:
            torch.cuda.current_stream(device).wait_event(arrival.event)
        with _in_place(self._places[index], arrival.weights):
            yield

    def _fetch(self, index: int, device: torch.device) -> _Arrival:
        shards = [module.get_parameter(name) for module, name in self._places[index]]
        # Room comes from the compute stream, which uses it last, so that the allocator hands the room of a layer that
        # is done to the next without an event between. Hence the copies wait for what has been queued so far.
        rooms = [_room(shard, device) for shard in shards]
        if device.type != "cuda":
            return _Arrival([_fill(*pair) for pair in zip(rooms, shards, strict=True)], None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            weights = [_fill(*pair) for pair in zip(rooms, shards, strict=True)]
            return _Arrival(weights, self._stream.record_event())


def _in_backward() -> bool:
    """Whether autograd runs on this thread: layers are then wanted from the last to the first."""
    return torch._C._current_graph_task_id() != -1  # which torch.utils.checkpoint asks too; nothing public says it


def _frozen(layer: nn.Module) -> list[Place]:
    return [
        (module, name)
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad
    ]


def _room(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """[W, R, ...] for the rows of all W ranks, R to each, the last of which may have fewer."""
    rows, ranks = own_rows(parameter), collectives.size(own_rows(parameter).group)
    share = rows_per_rank(rows.total, ranks)
    return torch.empty(ranks, share, *parameter.shape[1:], dtype=parameter.dtype, device=device)


def _fill(room: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    """The parameter with all its rows; its bytes are copied and gathered, never its values."""
    rows, own = own_rows(parameter), local(parameter).detach()
    place = room[collectives.rank(rows.group)]
    place[: rows.count].view(torch.uint8).copy_(own.view(torch.uint8), non_blocking=True)
    if rows.group is not None:
        collectives.all_gather_into(room.view(torch.uint8).flatten(), place.view(torch.uint8).flatten(), rows.group)
    return nn.Parameter(room.flatten(0, 1)[: rows.total], requires_grad=False)


@contextmanager
def _in_place(places: list[Place], weights: list[nn.Parameter]) -> Iterator[None]:
    held = [module.get_parameter(name) for module, name in places]
    try:
        for (module, name), weight in zip(places, weights, strict=True):
            setattr(module, name, weight)
        yield
    finally:
        for (module, name), shard in zip(places, held, strict=True):
            setattr(module, name, shard)
