"""A run's datasets, tokenized once a node where they are large, and the same on every rank."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from qsharded.config import TrainConfig
from qsharded.data import Dataset, Mixture, Tokenizer, load_examples
from qsharded.data.cache import SMALL_BYTES, DataCache, default_folder
from qsharded.data.fill import Enough
from qsharded.data.row_source import row_source
from qsharded.distributed.agreement import first_error
from qsharded.distributed.world import World
from qsharded.training.data_options import reading
from qsharded.utils import heartbeat

_T = TypeVar("_T")


def load_datasets(config: TrainConfig, tokenizer: Tokenizer, world: World) -> tuple[Mixture, dict[str, Dataset]]:
    """(what is trained on, the sets that are evaluated on by their names). Every rank calls this.

    Raises:
        ValueError: as ``load_examples``, or the cache cannot be written.
    """
    load = partial(_load, config, tokenizer, world)
    enough = _enough(config, world) if config.streaming else None
    parts = {dataset: load(dataset, config.dataset_split, enough) for dataset in config.datasets}
    train_data = Mixture(parts, config.dataset_weights or None)
    if config.eval_split:
        train_data, held_out = train_data.split(config.eval_split, config.seed)
        return train_data, {"": held_out}
    split = eval_dataset_split(config)
    return train_data, {name: load(source, split) for name, source in config.eval_sets.items()}


def eval_dataset_split(config: TrainConfig) -> str:
    """The split that ``--eval-dataset`` is read from."""
    return config.eval_dataset_split or config.dataset_split


def _enough(config: TrainConfig, world: World) -> Enough:
    """What ``--max-steps`` takes, beside what is held out; packed, rows of a batch are full."""
    in_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
    rows = math.ceil(config.max_steps * in_step / (1 - config.eval_split))
    return Enough(rows, rows * config.max_length if config.packing else 0)


def _load(
    config: TrainConfig, tokenizer: Tokenizer, world: World, source: str, split: str, enough: Enough | None = None
) -> Dataset:
    how = reading(config)
    rows = row_source(source, split, streaming=enough is not None)
    if config.data_cache is None and enough is None and 0 < rows.nbytes < SMALL_BYTES:
        return load_examples(source, tokenizer, split=split, **vars(how))
    folder = default_folder() if config.data_cache is None else Path(config.data_cache)
    cache = DataCache(folder, tokenizer, how, shows_progress=world.is_main, enough=enough)
    with heartbeat.working_outside(f"tokenizing {source}, or waiting for the rank of this node that does"):
        return once_a_node(world, lambda: cache.dataset(source, rows))


def once_a_node(world: World, load: Callable[[], _T]) -> _T:
    """What ``load`` returns, called by one rank of each node before the others, which find what it has prepared.

    Every rank calls this, and waits however long it takes.

    Raises:
        ValueError: ``load`` raised it, or an OSError, on the first rank of a node; on every rank with its message.
    """
    found: list[_T] = []
    error: Exception | None = None
    if world.local_rank == 0:
        try:
            found.append(load())
        except (ValueError, OSError) as caught:
            error = caught
    if (said := first_error(world, error)) is not None:
        raise ValueError(said)
    return found[0] if found else load()
