"""Which cards, how many, how long a row: what each holds of a model, and an estimate of how fast."""

from collections.abc import Iterator
from dataclasses import replace

from qsharded.config import TrainConfig
from qsharded.models import ModelConfig
from qsharded.plan.gpu_memory import Plan, Planner
from qsharded.plan.speed import estimate
from qsharded.utils.cards import CARDS, CardName
from qsharded.utils.hardware import GIB

_SWEPT: tuple[CardName, ...] = ("RTX4090", "A6000", "A100-80GB", "H200")
_RANKS = (1, 2, 4, 8)
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def sweep(planner: Planner, config: TrainConfig) -> str:
    """A table: for each card and number of them the longest row that fits, in micro-batches of one row."""
    settings = replace(config, per_device_train_batch_size=1, dp_replicate=1, sharding="full", checkpointed_layers=None)
    if settings.activation_checkpointing == "auto" or settings.activation_checkpointing == "none":
        settings = replace(settings, activation_checkpointing="full")
    unknown = replace(planner, gpu_bytes=None)
    plans = {ranks: list(_plans(unknown, settings, ranks)) for ranks in _RANKS}
    rows = [_row(planner, name, plans[ranks]) for name in _SWEPT for ranks in _RANKS]
    mode = settings.activation_checkpointing
    head = f"other cards, one row a micro-batch, --activation-checkpointing {mode}; tokens/s are estimates"
    columns = f"  {'card':<12}{'GPUs':>5}{'longest row':>13}{'GiB':>7}{'tokens/s':>12}"
    return "\n".join([head, columns, *rows]) + "\n"


def _plans(planner: Planner, config: TrainConfig, ranks: int) -> Iterator[Plan]:
    limit = planner.model_config.max_position_embeddings
    for length in _LENGTHS:
        if length <= limit:
            yield planner.plan(replace(config, max_length=length), ranks)


def _row(planner: Planner, name: CardName, plans: list[Plan]) -> str:
    card, head = CARDS[name], f"  {name:<12}{plans[0].ranks:>5}"
    fitting = [plan for plan in plans if plan.needed <= card.memory_gib * GIB]
    if not fitting:
        return f"{head}{'none fits':>13}"
    plan = fitting[-1]
    fits = f"{head}{plan.config.max_length:>13}{plan.needed / GIB:>7.1f}"
    if not isinstance(planner.model_config, ModelConfig):
        return fits  # what transformers' models compute is not known
    return f"{fits}{estimate(planner.model, plan, card).tokens_per_second:>12,.0f}"
