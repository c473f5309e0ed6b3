"""Does this machine train this model? One layer as it is sharded, fused and checkpointed, against its plain twin.

What no test elsewhere can know: this build of PyTorch, these kernels, this family's code, this layout. It takes a
moment, so it is asked at every start.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsharded.config import TrainConfig
from qsharded.distributed.layer_twin import LayerTwin, Passes
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.utils import collectives, heartbeat

# On a GPU as many as take the way of training's products; in both cases few enough to cost nothing.
_TOKENS = {"cuda": 256, "cpu": 64}
# Sums in another order, and in bf16 activations rounded in other places, move a layer's output by less than 2% and its
# gradients by up to 6% (a layer in the middle of SmolLM2). A rank left out of a mean of two, an adapter left out or a
# wrong scale moves them by a third and more.
_OUTPUT_GAP = {torch.bfloat16: 0.1, torch.float32: 1e-3}
_GRADIENT_GAP = {torch.bfloat16: 0.2, torch.float32: 1e-3}
_ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-20}  # of what the layer's own part is added to
_SMALL = 0.01  # of the largest adapter's gradient: what is no more may differ by rounding alone
_LISTED = 3  # complaints


class SelfCheckFailed(RuntimeError):
    """A layer computes something else than its plain twin."""


@dataclass(frozen=True, order=True)
class _Complaint:
    """``order``: how near to the cause."""

    order: int
    words: str = field(compare=False)


_BYTES, _FROZEN, _OUTPUT, _GRADIENT = range(4)


@dataclass
class _Verdict:
    """What one rank found.

    Attributes:
        complaints: what differs, causes before what they lead to; empty where nothing does.
        output, gradients: the largest relative gap.
    """

    complaints: list["_Complaint"] = field(default_factory=list)
    output: float = 0.0
    gradients: float = 0.0


def self_check(config: TrainConfig, world: World, model: CausalLM, twin: LayerTwin) -> str:
    """A line on what was compared, empty where --self-check auto leaves it out; every rank calls this.

    Raises:
        SelfCheckFailed: on every rank, naming what differs on the first one where anything does.
    """
    if config.self_check == "never":
        return "self-check: left out (--self-check never)"
    if config.self_check == "auto" and world.device.type == "cuda":
        return ""
    if twin.index is None:
        return "self-check: left out, as no layer trains"
    heartbeat.beat("self-check")
    start = time.monotonic()
    found = collectives.all_gather_objects(_verdict(config, world, model, twin), world.long_timeout_group)
    differing = [(verdict.complaints[0], rank) for rank, verdict in enumerate(found) if verdict.complaints]
    if differing:
        _, rank = min(differing)
        raise SelfCheckFailed(_refusal(twin, rank, [complaint.words for complaint in found[rank].complaints]))
    return _line(world, twin, found, time.monotonic() - start)


def _verdict(config: TrainConfig, world: World, model: CausalLM, twin: LayerTwin) -> _Verdict:
    trains, plain, changed = twin.passes(model, world, min(_TOKENS[world.device.type], config.max_length))
    bytes_ = [_Complaint(_BYTES, f"{name} was computed with other bytes than its weight has") for name in changed]
    frozen = [_Complaint(_FROZEN, f"{name} is frozen, and has a gradient") for name in dict.fromkeys(trains.frozen)]
    verdict = _Verdict(bytes_ + frozen)
    _compare(trains, plain, verdict)
    return verdict


def _compare(trains: Passes, plain: Passes, verdict: _Verdict) -> None:
    dtype = plain.output.dtype
    floor = _ROUNDING[dtype] * plain.output.numel() ** 0.5
    outputs, gradients = (trains.output, plain.output), (trains.gradient, plain.gradient)
    verdict.output = _gap(_OUTPUT, "output", outputs, floor, _OUTPUT_GAP[dtype], verdict)
    verdict.gradients = _gap(_GRADIENT, "input's gradient", gradients, floor, _GRADIENT_GAP[dtype], verdict)
    _compare_trained(trains, plain, _GRADIENT_GAP[dtype], verdict)


def _compare_trained(trains: Passes, plain: Passes, limit: float, verdict: _Verdict) -> None:
    norms = [float(gradient.norm()) for gradient in plain.trained.values() if gradient is not None]
    floor = _SMALL * limit * max(norms, default=0.0)
    for name, right in plain.trained.items():
        assert right is not None
        seen = trains.trained[name]
        has_none = seen is None or (seen.numel() > 0 and not bool(seen.any()))
        if has_none and (bool(right.any()) or name.rpartition(".lora_")[0] in plain.adapted):
            verdict.complaints.append(_Complaint(_GRADIENT, f"{name} trains, and has no gradient"))
        elif seen is not None:
            own_limit = limit + torch.finfo(seen.dtype).eps  # adapters may be narrower than what they are beside
            gap = _gap(_GRADIENT, f"gradient of {name}", (seen, right), floor, own_limit, verdict)
            verdict.gradients = max(verdict.gradients, gap)


def _gap(order: int, what: str, values: tuple[Tensor, Tensor], floor: float, limit: float, verdict: _Verdict) -> float:
    """How far the first of two ``values`` lies from the second, relative; a complaint where that is above ``limit``,
    and more than ``floor``."""
    seen, right = (value.float() for value in values)
    distance, size = float((seen - right).norm()), float(right.norm())
    if not distance <= limit * size + floor:  # NaN is not
        words = f"the {what} differs by {distance / max(size, 1e-30):.1%}, where rounding explains {limit:.1%}"
        verdict.complaints.append(_Complaint(order, words))
    return distance / size if size > floor else 0.0


def _refusal(twin: LayerTwin, rank: int, complaints: list[str]) -> str:
    more = f"; and {len(complaints) - _LISTED} more" if len(complaints) > _LISTED else ""
    return (
        f"self-check: layer {twin.index} is not what it is without sharding, fusing and checkpointing, on rank {rank}: "
        f"{'; '.join(complaints[:_LISTED])}{more}. Nothing was trained. python -m qsharded.doctor looks for a cause; "
        "QSHARDED_BACKEND=reference takes PyTorch's kernels instead of ours; --self-check never trains all the same"
    )


def _line(world: World, twin: LayerTwin, found: list[_Verdict], seconds: float) -> str:
    output, gradients = (max(getattr(verdict, name) for verdict in found) for name in ("output", "gradients"))
    probe = "gather probe exact, " if world.mesh is not None else ""
    return (
        f"self-check: {probe}layer {twin.index} computes as its bytes unsharded: "
        f"output within {output:.2%}, gradients within {gradients:.2%}, none for the base; {seconds:.2f} s"
    )
