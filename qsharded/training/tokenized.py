"""A run's datasets, tokenized once a node where they are large, and the same on every rank."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

from qsharded.config import TrainConfig
from qsharded.data import Dataset, Mixture, Tokenizer, load_examples
from qsharded.data.cache import SMALL_BYTES, DataCache, default_folder
from qsharded.data.fill_progress import Enough
from qsharded.data.growing import Growing
from qsharded.data.row_source import RowSource, row_source
from qsharded.data.streams import Streams
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
    split = eval_dataset_split(config)
    load = partial(_load, config, tokenizer, world)
    if config.streaming:
        streams = _open_streams(config, tokenizer, world)
        held_out = {"": streams.evaluation()} if config.eval_split else {}
        return streams.window(0), held_out | {name: load(source, split) for name, source in config.eval_sets.items()}
    parts = {dataset: load(dataset, config.dataset_split) for dataset in config.datasets}
    train_data = Mixture(parts, config.dataset_weights or None)
    if config.eval_split:
        train_data, held_out_rows = train_data.split(config.eval_split, config.seed)
        return train_data, {"": held_out_rows}
    return train_data, {name: load(source, split) for name, source in config.eval_sets.items()}


def _open_streams(config: TrainConfig, tokenizer: Tokenizer, world: World) -> Streams:
    """The datasets, of each of which the first window is there."""
    cache = _cache(config, tokenizer, world, _enough(config, world))
    parts = {}
    for dataset in config.datasets:
        rows = row_source(dataset, config.dataset_split, streaming=True)
        open_one = cache.start if world.local_rank == 0 else cache.growing
        with _waiting(dataset):
            parts[dataset] = once_a_node(world, partial(_with_window, open_one, dataset, rows))
    return Streams(parts, config.dataset_weights or None, config.eval_split, config.seed)


def _with_window(open_one: Callable[[str, RowSource], Growing], dataset: str, rows: RowSource) -> Growing:
    found = open_one(dataset, rows)
    found.window(0)
    return found


def eval_dataset_split(config: TrainConfig) -> str:
    """The split that ``--eval-dataset`` is read from."""
    return config.eval_dataset_split or config.dataset_split


def _enough(config: TrainConfig, world: World) -> Enough:
    """What ``--max-steps`` takes, beside what is held out; packed, rows of a batch are full."""
    in_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
    rows = math.ceil(config.max_steps * in_step / (1 - config.eval_split))
    return Enough(rows, rows * config.max_length if config.packing else 0)


def _load(config: TrainConfig, tokenizer: Tokenizer, world: World, source: str, split: str) -> Dataset:
    rows = row_source(source, split)
    if config.data_cache is None and 0 < rows.nbytes < SMALL_BYTES:
        return load_examples(source, tokenizer, split=split, **vars(reading(config)))
    cache = _cache(config, tokenizer, world)
    with _waiting(source):
        return once_a_node(world, lambda: cache.dataset(source, rows))


def _cache(config: TrainConfig, tokenizer: Tokenizer, world: World, enough: Enough | None = None) -> DataCache:
    folder = default_folder() if config.data_cache is None else Path(config.data_cache)
    return DataCache(folder, tokenizer, reading(config), shows_progress=world.is_main, enough=enough)


def _waiting(source: str) -> AbstractContextManager[None]:
    return heartbeat.working_outside(f"tokenizing {source}, or waiting for the rank of this node that does")


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
