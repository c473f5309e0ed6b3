"""The nearest settings that fit where those asked for do not, found by planning them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from qsharded.config import TrainConfig
from qsharded.plan.gpu_memory import Plan, Planner
from qsharded.utils.checkpointing_modes import Mode

_RANKS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
_SHORTEST = 128
_FREED = "--reshard-after-forward always"
_MODES: tuple[Mode, ...] = get_args(Mode)  # each takes less memory than the one before


@dataclass(frozen=True)
class Alternative:
    """Other settings, as the user would write them, and their plan."""

    words: str
    plan: Plan


def nearest(planner: Planner, plan: Plan) -> list[Alternative]:
    """Of each kind of change the smallest that fits, those that keep the result first; where no kind suffices alone,
    the most frugal step that keeps it, or changes on top of that. Empty where nothing helps, ``plan`` fits, or the GPU
    is not known."""
    if plan.fits is not False:
        return []
    if alone := _smallest_of_each(planner, plan, ""):
        return alone
    frugal, words = _frugal(planner, plan)
    return [Alternative(words, frugal)] if frugal.fits else _smallest_of_each(planner, frugal, words)


def _smallest_of_each(planner: Planner, plan: Plan, already: str) -> list[Alternative]:
    config = plan.config
    ladders = (
        _share(config),
        _free_gathered(config),
        _recompute(config),
        _micro_batch(config),
        _offload(config),
        _ranks(plan),
        _length(config),
    )
    found = (_first_that_fits(planner, plan, ladder, already) for ladder in ladders)
    return [alternative for alternative in found if alternative]


def _first_that_fits(
    planner: Planner, plan: Plan, ladder: Iterator[tuple[str, TrainConfig, int | None]], already: str
) -> Alternative | None:
    for words, config, ranks in ladder:
        other = planner.plan(config, ranks or plan.ranks)
        if other.fits:
            return Alternative(f"{already} {words}".strip(), other)
    return None


def _frugal(planner: Planner, plan: Plan) -> tuple[Plan, str]:
    """The plan with every change that alters no result, and how it is written."""
    config, written = plan.config, list[str]()
    for ladder in (_share, _free_gathered, _recompute, _micro_batch, _offload):
        for words, changed, _ in list(ladder(config))[-1:]:
            config, written = changed, [*written, words]
    return planner.plan(config, plan.ranks), " ".join(written)


# Each ladder yields (flags, settings, ranks or None for the same), from the mildest change on.


def _share(config: TrainConfig) -> Iterator[tuple[str, TrainConfig, None]]:
    """Fewer copies of the frozen weights."""
    if config.sharding != "full":
        yield "--sharding full", replace(config, sharding="full"), None
    if config.dp_replicate > 1:
        yield "--dp-replicate 1", replace(config, dp_replicate=1), None


def _free_gathered(config: TrainConfig) -> Iterator[tuple[str, TrainConfig, None]]:
    if config.reshard_after_forward == "never":
        yield _FREED, replace(config, reshard_after_forward="always"), None


def _recompute(config: TrainConfig) -> Iterator[tuple[str, TrainConfig, None]]:
    mode = config.checkpointing.mode
    if config.checkpointed_layers is not None:
        yield "with all layers checkpointed", replace(config, checkpointed_layers=None), None
    for less in _MODES[_MODES.index(mode) + 1 :]:
        changed = replace(config, activation_checkpointing=less, checkpointed_layers=None)
        yield f"--activation-checkpointing {less}", changed, None


def _offload(config: TrainConfig) -> Iterator[tuple[str, TrainConfig, None]]:
    """Frozen weights in host memory; that asks for layers that are computed again whole, and not for copies."""
    if config.cpu_offload:
        return
    mode, words = config.checkpointing.mode, "--cpu-offload"
    if mode not in ("full", "offloaded"):
        mode, words = "full", f"{words} --activation-checkpointing full"
    if config.sharding == "replicate":
        words = f"{words} --sharding full"
    for flags, freed, _ in _free_gathered(config):
        words, config = f"{words} {flags}", freed
    changed = replace(config, sharding="full", activation_checkpointing=mode, checkpointed_layers=None)
    yield words, replace(changed, cpu_offload=True), None


def _micro_batch(config: TrainConfig) -> Iterator[tuple[str, TrainConfig, None]]:
    """Smaller micro-batches, and more of them: a step keeps its rows."""
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    for smaller in sorted((part for part in range(1, size) if size % part == 0), reverse=True):
        more = accumulation * size // smaller
        words = f"--per-device-train-batch-size {smaller} --gradient-accumulation-steps {more}"
        yield words, replace(config, per_device_train_batch_size=smaller, gradient_accumulation_steps=more), None


def _ranks(plan: Plan) -> Iterator[tuple[str, TrainConfig, int]]:
    for ranks in _RANKS:
        if ranks > plan.ranks and ranks % plan.config.dp_replicate == 0:
            yield f"on {ranks} GPUs", plan.config, ranks


def _length(config: TrainConfig) -> Iterator[tuple[str, TrainConfig, None]]:
    length = config.max_length // 2
    while length >= _SHORTEST:
        yield f"--max-length {length}", replace(config, max_length=length), None
        length //= 2
