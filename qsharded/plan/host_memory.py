"""Host memory and disk of a training run."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.load import packed_modules, parameter_count
from qsharded.config import TrainConfig
from qsharded.models import CausalLM
from qsharded.models.config import declared_dtype
from qsharded.plan.gpu_memory import Plan
from qsharded.plan.optimizer import state_bytes
from qsharded.plan.parameters import ADAPTERS, parameters
from qsharded.quant.experts import PackedExperts
from qsharded.quant.linear import PackedLinear
from qsharded.utils.hardware import GIB

# An interpreter that has loaded PyTorch and CUDA's libraries: an estimate, it differs between their versions.
_INTERPRETER_BYTES = int(2.5 * GIB)
_INTERPRETER, _LOADING, _WEIGHTS = "interpreter", "reading the checkpoint", "frozen weights"
# What loading may hold of a checkpoint at a time, beyond that: bounded for any size of model.
_LOADING_BYTES = 2 * GIB


@dataclass(frozen=True)
class Need:
    """Bytes of host memory or disk, and what they are for."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class HostVerdict:
    """What all ranks on a host take of its memory, and what it has; None where that is not known."""

    needed: int
    available: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the host holds it."""
        return None if self.available is None else self.needed <= self.available

    @property
    def words(self) -> str:
        """Needed of available, as a part of a sentence."""
        if self.available is None:
            return f"{self.needed / GIB:.1f} GiB of the host (--host-memory-gib says how much there is)"
        return f"{self.needed / GIB:.1f} of {self.available / GIB:.1f} GiB of the host"


def host_verdict(needs: Iterable[Need], ranks: int, available: int | None) -> HostVerdict:
    """The host's: ``ranks`` of them are on it. What loading holds is given back, before the rest is taken by and by."""
    by_name = {need.name: need.bytes for need in needs}
    loading = by_name.pop(_LOADING, 0)
    kept = sum(by_name.values())
    weights = by_name.get(_INTERPRETER, 0) + by_name.get(_WEIGHTS, 0)
    return HostVerdict(ranks * max(kept, weights + loading), available)


def host_memory(model: CausalLM, plan: Plan) -> list[Need]:
    """What a rank takes of its machine's memory; the dataset's rows come to that."""
    sharing = plan.ranks // plan.config.dp_replicate
    needs = [
        Need(_INTERPRETER, _INTERPRETER_BYTES, "Python, PyTorch, CUDA's libraries"),
        Need(_LOADING, _LOADING_BYTES, "at most, and given back"),
        Need(
            "checkpoint's copy",
            _checkpoint(model, plan.config, sharing),
            "adapters and optimizer state, while they are written",
        ),
        Need(_WEIGHTS, plan.on_host.weights, "--cpu-offload"),
        Need("optimizer state", plan.on_host.optimizer, "paged: the GPU has no room for it"),
        Need("activations", plan.on_host.activations, "--activation-checkpointing offloaded"),
    ]
    return [need for need in needs if need.bytes]


def disk(model: CausalLM, config: TrainConfig, described: dict[str, Any], *, is_packed: bool = False) -> list[Need]:
    """What the run writes, and what it downloads first. ``described`` is the model's config.json; ``is_packed``: the
    checkpoint holds the packed layers as they are."""
    trained = parameters(model, ranks=1).resident[ADAPTERS]
    needs = [Need("adapter", trained), _checkpoints(model, config)]
    if not Path(config.model).is_dir() and not config.random_init:
        needs.insert(0, Need("download", _download(model, described, is_packed), "unless the Hub's cache has it"))
    return [need for need in needs if need.bytes]


def _download(model: CausalLM, described: dict[str, Any], is_packed: bool) -> int:
    width = 4 if "float32" in (declared_dtype(described) or "") else 2
    layers = packed_modules(model) if is_packed else []
    plain = parameter_count(model) - sum(_weights(layer) for layer in layers)
    return plain * width + sum(_packed(layer) for layer in layers)


def _weights(layer: PackedLinear | PackedExperts) -> int:
    return layer.weight.shape[0] * layer.in_features


def _packed(layer: PackedLinear | PackedExperts) -> int:
    """Bytes of packed weights in a checkpoint: codes and their scales, without the padding of rows in memory."""
    blocks = _weights(layer) // layer.block_size
    if layer.weight_absmax_scales is None:
        return layer.weight.nbytes + blocks * torch.float32.itemsize
    return layer.weight.nbytes + blocks + layer.weight_absmax_scales.nbytes


def _checkpoints(model: CausalLM, config: TrainConfig) -> Need:
    one = _checkpoint(model, config, 1)
    if not config.save_steps:
        return Need("checkpoints", 0)
    planned = config.max_steps // config.save_steps if config.max_steps > 0 else None
    # the oldest goes when the newest is complete
    limit = config.save_total_limit + 1 if config.save_total_limit else None
    counts = [count for count in (planned, limit) if count is not None]
    if not counts:
        return Need("checkpoints", one, "each; --save-total-limit bounds their number")
    return Need("checkpoints", one * min(counts), f"{min(counts)} of {one / GIB:.2f} GiB")


def _checkpoint(model: CausalLM, config: TrainConfig, ranks: int) -> int:
    """Adapters and optimizer state: the part of one of ``ranks``."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return parameters(model, ranks=ranks).resident[ADAPTERS] + state_bytes(trained, config.optim, ranks=ranks)
