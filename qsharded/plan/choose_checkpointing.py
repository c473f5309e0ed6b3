"""What "auto" stands for in --activation-checkpointing and --reshard-after-forward: the fastest that fits the GPU.

A layer that keeps what its backward reads saves its recomputation, and each costs and saves the same; so the fastest is
the one in which most layers keep all. Keeping a part of every layer is no better bargain: a product's output takes
memory in the measure in which it takes time to compute again. Layers that stay gathered save far less time: they get
what is left.
"""

from collections.abc import Callable
from dataclasses import replace

from qsharded.config import TrainConfig
from qsharded.plan.captured_layers import CannotPlan
from qsharded.plan.gpu_memory import Plan, Planner
from qsharded.utils.checkpointing_modes import Mode
from qsharded.utils.hardware import GIB

_HOST_SHARE = 2  # inputs may take a half of the host memory that is available to the rank


def choose_checkpointing(
    planner: Planner, config: TrainConfig, ranks: int, host_bytes: int | None = None
) -> tuple[TrainConfig, str]:
    """The settings with each "auto" replaced, and a line that says by what; others as they are, and no line.

    Args:
        planner: knows the GPU. Where it does not, the choice is what takes least of a GPU and nothing of the host.
        host_bytes: of host memory that a rank has for layers' inputs; None where it is not known: then none go there.
    """
    config, line = _with_checkpointing(planner, config, ranks, host_bytes)
    if not _may_keep_gathered(planner, config, ranks, host_bytes):
        return config, line
    kept = "layers stay gathered from forward to backward, as all of them fit"
    return replace(config, reshard_after_forward="never"), f"{line}; {kept}" if line else kept


def _with_checkpointing(
    planner: Planner, config: TrainConfig, ranks: int, host_bytes: int | None
) -> tuple[TrainConfig, str]:
    if config.activation_checkpointing != "auto":
        return config, ""
    try:
        chosen = _chosen(planner, config, ranks, host_bytes)
    except CannotPlan as why:
        return replace(config, activation_checkpointing="full"), f"activation checkpointing: full, as {why}"
    return chosen, f"activation checkpointing: {_described(chosen, planner)}"


def _may_keep_gathered(planner: Planner, config: TrainConfig, ranks: int, host_bytes: int | None) -> bool:
    is_open = config.reshard_after_forward == "auto" and not config.cpu_offload and ranks > config.dp_replicate
    if not is_open or planner.gpu_bytes is None:
        return False
    try:
        return _fits(planner.plan(replace(config, reshard_after_forward="never"), ranks), host_bytes)
    except CannotPlan:
        return False


def _chosen(planner: Planner, config: TrainConfig, ranks: int, host_bytes: int | None) -> TrainConfig:
    full = replace(config, activation_checkpointing="full")
    if planner.gpu_bytes is None:
        return full
    modes: tuple[Mode, ...] = ("full",) if host_bytes is None else ("full", "offloaded")
    layers = planner.model_config.num_hidden_layers

    def fits(settings: TrainConfig) -> bool:
        return _fits(planner.plan(settings, ranks), host_bytes)

    if not config.cpu_offload:
        kept = replace(config, activation_checkpointing="none")
        if fits(kept):
            return kept
        mixed = [_fewest_checkpointed(replace(config, activation_checkpointing=mode), layers, fits) for mode in modes]
        if found := [settings for settings in mixed if settings]:
            return min(found, key=lambda settings: settings.checkpointing.checkpointed(layers))
    # also where none fits, with the optimizer's state in host memory or not at all: then the plan says what would
    return next((s for s in (replace(config, activation_checkpointing=mode) for mode in modes) if fits(s)), full)


def _fewest_checkpointed(settings: TrainConfig, layers: int, fits: Callable[[TrainConfig], bool]) -> TrainConfig | None:
    """With so many layers checkpointed as it takes to fit, all but one at the most; None where that does not do."""
    low, high = 1, layers  # checkpointed layers: too few below ``low``, enough from ``high`` on, if at all
    while low < high:
        middle = (low + high) // 2
        if fits(replace(settings, checkpointed_layers=middle)):
            high = middle
        else:
            low = middle + 1
    return replace(settings, checkpointed_layers=high) if high < layers else None


def _fits(plan: Plan, host_bytes: int | None) -> bool:
    """On the GPU, without optimizer state that gives way to activations, and what of them is in host memory there."""
    in_host_memory = plan.on_host.activations * _HOST_SHARE <= (host_bytes or 0)
    return bool(plan.fits) and not plan.on_host.optimizer and in_host_memory


def _described(config: TrainConfig, planner: Planner) -> str:
    layers = planner.model_config.num_hidden_layers
    checkpointed = config.checkpointing.checkpointed(layers)
    written: str = config.activation_checkpointing
    if checkpointed < layers and written != "none":
        written = f"{written} for the first {checkpointed} of {layers} layers, the others keep all"
    if planner.gpu_bytes is None:
        return f"{written}, as the GPU is not known"
    return f"{written}, the fastest that the plan says fits {planner.gpu_bytes / GIB:.1f} GiB"
