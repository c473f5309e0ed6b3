"""Does this machine train this model? One layer as it is sharded, fused and checkpointed, against its plain twin.

What no test elsewhere can know: this build of PyTorch, these kernels, this family's code, this layout. It takes a
moment, so it is asked at every start.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.config import TrainConfig
from qsharded.distributed.layer_twin import LayerTwin, Passes
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.utils import collectives, heartbeat

_TOKENS = 256  # as many as take the way of training's products, and few enough to cost nothing
# Sums in another order, and in bf16 activations rounded in other places, move a layer's output and gradients by less
# than 2%. A rank left out of a mean of two, an adapter left out or a wrong scale moves them by a third and more.
_GAP = {torch.bfloat16: 0.1, torch.float32: 1e-3}
_ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-20}  # of what the layer's own part is added to


class SelfCheckFailed(RuntimeError):
    """A layer computes something else than its plain twin."""


@dataclass
class _Verdict:
    """What one rank found.

    Attributes:
        complaints: what differs; empty where nothing does.
        output, gradients: the largest relative gap.
    """

    complaints: list[str]
    output: float = 0.0
    gradients: float = 0.0


def self_check(config: TrainConfig, world: World, model: CausalLM, twin: LayerTwin) -> str:
    """A line on what was compared; every rank calls this.

    Raises:
        SelfCheckFailed: on every rank, naming what differs on the first one where anything does.
    """
    if config.skip_self_check:
        return "self-check: left out (--skip-self-check)"
    if twin.index is None:
        return "self-check: left out, as no layer trains"
    heartbeat.beat("self-check")
    start = time.monotonic()
    found = collectives.all_gather_objects(_verdict(config, world, model, twin), world.long_timeout_group)
    for rank, verdict in enumerate(found):
        if verdict.complaints:
            raise SelfCheckFailed(_refusal(twin, rank, verdict))
    return _line(world, twin, found, time.monotonic() - start)


def _verdict(config: TrainConfig, world: World, model: CausalLM, twin: LayerTwin) -> _Verdict:
    trains, plain, changed = twin.passes(model, world, min(_TOKENS, config.max_length))
    verdict = _Verdict([f"{name} was computed with other bytes than its weight has" for name in changed])
    verdict.complaints += [f"{name} is frozen, and has a gradient" for name in dict.fromkeys(trains.frozen)]
    _compare(trains, plain, verdict)
    return verdict


def _compare(trains: Passes, plain: Passes, verdict: _Verdict) -> None:
    dtype = plain.output.dtype
    limit, rounding = _GAP[dtype], _ROUNDING[dtype]
    size = plain.output.numel() ** 0.5  # of the input and of the output's gradient
    for what, seen, right in (
        ("output", trains.output, plain.output),
        ("input's gradient", trains.gradient, plain.gradient),
    ):
        verdict.output = max(verdict.output, _gap(what, seen, right, rounding * size, limit, verdict))
    _compare_trained(trains, plain, limit, verdict)


def _compare_trained(trains: Passes, plain: Passes, limit: float, verdict: _Verdict) -> None:
    norms = [float(gradient.norm()) for gradient in plain.trained.values() if gradient is not None]
    floor = 0.01 * limit * max(norms, default=0.0)
    for name, right in plain.trained.items():
        assert right is not None
        seen = trains.trained[name]
        has_none = seen is None or (seen.numel() > 0 and not bool(seen.any()))
        if has_none and (bool(right.any()) or name.rpartition(".lora_")[0] in plain.adapted):
            verdict.complaints.append(f"{name} trains, and has no gradient")
        elif seen is not None:
            gap = _gap(f"gradient of {name}", seen, right, floor, limit, verdict)
            verdict.gradients = max(verdict.gradients, gap)


def _gap(what: str, seen: Tensor, right: Tensor, floor: float, limit: float, verdict: _Verdict) -> float:
    """How far ``seen`` lies from ``right``, relative; complains where that is more than ``limit``, beyond ``floor``."""
    distance, size = float((seen.float() - right.float()).norm()), float(right.float().norm())
    if not distance <= limit * size + floor:  # NaN is not
        verdict.complaints.append(
            f"the {what} differs by {distance / max(size, 1e-30):.1%}, at most {limit:.1%} is rounding"
        )
    return distance / size if size > floor else 0.0


def _refusal(twin: LayerTwin, rank: int, verdict: _Verdict) -> str:
    listed = "; ".join(verdict.complaints[:3]) + (
        f"; and {len(verdict.complaints) - 3} more" * (len(verdict.complaints) > 3)
    )
    return (
        f"self-check: layer {twin.index} is not what it is without sharding, fusing and checkpointing, on rank {rank}: "
        f"{listed}. Nothing was trained. python -m qsharded.doctor looks for a cause; QSHARDED_BACKEND=reference takes "
        "PyTorch's kernels instead of ours; --skip-self-check trains all the same"
    )


def _line(world: World, twin: LayerTwin, found: list[_Verdict], seconds: float) -> str:
    output, gradients = (max(getattr(verdict, name) for verdict in found) for name in ("output", "gradients"))
    probe = "gather probe exact, " if world.mesh is not None else ""
    return (
        f"self-check: {probe}layer {twin.index} computes as its bytes unsharded: "
        f"output within {output:.2%}, gradients within {gradients:.2%}, none for the base; {seconds:.2f} s"
    )
