"""Which layout a model's frozen weights get: cut over the ranks, whole on each, or in host memory.

The trainer and the planner both ask here; :mod:`qsharded.distributed.placement` carries it out.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn

from qsharded.distributed import vocab_parallel
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.utils import collectives, hardware


@dataclass(frozen=True)
class Layout:
    """Where the frozen weights are. What trains is cut over the ranks, and stays on the GPU, in any of them.

    Attributes:
        replicated: whole on every rank; else cut over the ranks.
        on_host: in host memory, from where a layer's come while the one before it runs.
        vocab_parallel: embedding and head are never gathered whole; None decides by their size. It takes both to be
            frozen, and nothing is split where all is replicated.
        keeps_gathered: a layer that was gathered for its forward stays whole until its backward.

    Raises:
        ValueError: replicated and on the host, or gathered and on the host.
    """

    replicated: bool = False
    on_host: bool = False
    vocab_parallel: bool | None = None
    keeps_gathered: bool = False

    def __post_init__(self) -> None:
        if self.on_host and self.keeps_gathered:
            raise ValueError("weights from the host are freed after each layer's forward: they cannot stay gathered")
        if self.replicated and self.on_host:
            raise ValueError("frozen weights are either replicated, for models that fit, or kept on the host, not both")


SHARDED = Layout()
"""Cut over the ranks, on the GPUs."""


class LayoutOptions(Protocol):
    """The options that choose a layout, as ``TrainConfig`` has them."""

    @property
    def sharding(self) -> Literal["full", "replicate", "auto"]: ...

    @property
    def cpu_offload(self) -> bool: ...

    @property
    def dp_replicate(self) -> int: ...

    @property
    def reshard_after_forward(self) -> Literal["always", "never", "auto"]: ...


def choose_layout(options: LayoutOptions, ranks: int, frozen: int, room: Callable[[], int]) -> tuple[Layout, str]:
    """The layout for ``frozen`` bytes of weights on so many ranks, and a line that says why where "auto" was given.

    Args:
        room: bytes of a rank's memory; asked only if the choice hangs on them, on every rank then.
    """
    if options.sharding != "auto" or ranks == 1:
        return _layout(options, replicated=options.sharding == "replicate" and ranks > 1), ""
    if options.cpu_offload or options.dp_replicate > 1:
        other = "--cpu-offload" if options.cpu_offload else f"--dp-replicate {options.dp_replicate}"
        return _layout(options, replicated=False), f"sharding: full, as {other} leaves --sharding auto no choice"
    available = room()
    fits = frozen <= available // 2  # the other half is for training beside them
    verdict = "replicated" if fits else f"cut over {ranks} ranks"
    share = f"the frozen weights take {frozen / 2**30:.1f} of a rank's {available / 2**30:.1f} GiB"
    return _layout(options, fits), f"sharding: {verdict}, as {share}, {'less' if fits else 'more'} than half"


def _layout(options: LayoutOptions, replicated: bool) -> Layout:
    return Layout(
        replicated=replicated,
        on_host=options.cpu_offload,
        keeps_gathered=options.reshard_after_forward == "never" and not replicated,
    )


def is_vocab_parallel(model: CausalLM, layout: Layout, is_shared: bool) -> bool:
    """Whether embedding and head are cut by rows and never gathered; ``is_shared``: by several ranks."""
    if layout.replicated or not vocab_parallel.can_split(model):
        return False
    if layout.vocab_parallel is not None:
        return layout.vocab_parallel
    return layout.on_host or (is_shared and vocab_parallel.is_large(model))


def frozen_bytes(model: nn.Module) -> int:
    """What the frozen parameters of ``model`` take where they are whole; a tied one counts once."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)


def least_memory(world: World) -> int:
    """Bytes of the smallest GPU among the ranks' own, or of a rank's part of a machine's memory where there is none."""
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
    else:
        total = hardware.memory() // _ranks_on_node()
    return _least(total, world)


def least_free_memory(world: World) -> int:
    """Bytes that the ranks may still take of the GPU with least left, or of a CPU's memory half of each one's part."""
    is_gpu = world.device.type == "cuda"
    return _least(free_gpu_memory(world.device) if is_gpu else free_host_memory() // 2, world)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this rank may still take of its GPU, and what it has taken."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def free_host_memory() -> int:
    """Bytes of this rank's part of what its machine has left."""
    return hardware.available_memory() // _ranks_on_node()


def _ranks_on_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _least(count: int, world: World) -> int:
    """The smallest of the ranks' counts."""
    return int(collectives.all_reduce(torch.tensor(count, device=world.device), dist.ReduceOp.MIN, world.group))
