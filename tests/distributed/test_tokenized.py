"""Ranks of a node share one tokenizing of a dataset, and what is wrong with its rows."""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded.config import TrainConfig
from qsharded.data import Tokenizer, cache, load_examples
from qsharded.data.cache import DataCache
from qsharded.data.fill import Fill
from qsharded.distributed.world import World, start_world
from qsharded.training import datasets
from qsharded.training.tokenized import load_datasets
from tests.checkpoints import write_chat_rows
from tests.distributed.harness import run_ranks


def load_on_rank(model: Path, rows: Path, bad: Path, cache: Path, ranks_a_node: int) -> tuple[Any, int, str]:
    """(ids of the training and of the evaluation rows, how many fills this rank has run, what is said of bad rows)."""
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % ranks_a_node)
    world, tokenizer, fills = start_world(), Tokenizer.from_folder(model), []
    run = Fill.run
    Fill.run = lambda self: (fills.append(self), run(self))[1]  # type: ignore[method-assign]
    options: dict[str, Any] = {"model": str(model), "eval_split": 0.2, "data_cache": str(cache)}
    train, evaluation = load_datasets(TrainConfig(dataset=str(rows), **options), tokenizer, world)
    found = [train, *evaluation.values()]
    ids = [[example.ids.tolist() for example in part.examples] for part in found]
    with pytest.raises(ValueError, match="json") as refused:
        load_datasets(TrainConfig(dataset=str(bad), **options), tokenizer, world)
    return ids, len(fills), str(refused.value)


def stream_on_rank(model: Path, rows: Path, cache_folder: Path) -> list[list[list[int]]]:
    """This rank's documents of four steps of a stream that a process tokenizes."""
    world, tokenizer = start_world(), Tokenizer.from_folder(model)
    cache.SMALL_BYTES = 0
    config = TrainConfig(
        model=str(model), dataset=str(rows), data_cache=str(cache_folder), streaming=True, max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    train, _ = load_datasets(config, tokenizer, world)
    loader = datasets._training_loader(config, world, tokenizer, train, vocab_size=1 << 20)
    steps = islice(loader.steps(), 4)
    return [[row.tolist() for batch in step.micro_batches for row in batch.input_ids] for step in steps]


def test_ranks_share_a_stream(model: Path, dataset: Path, tmp_path: Path) -> None:
    found = run_ranks(stream_on_rank, 2, model, dataset, tmp_path / "cache")
    tokenizer = Tokenizer.from_folder(model)
    expected = {tuple(example.ids.tolist()) for example in load_examples(dataset, tokenizer, max_length=64).examples}
    ends = {tokenizer.pad_id, tokenizer.eos_id}
    seen = [tuple(row) for steps in found for step in steps for row in step]
    assert len(seen) == len(set(seen)) == 16
    assert {tuple(t for t in row if t not in ends) for row in seen} <= {
        tuple(t for t in row if t not in ends) for row in expected
    }


@pytest.mark.parametrize("ranks_a_node", [1, 2])
def test_one_rank_of_a_node_fills_the_cache(model: Path, dataset: Path, tmp_path: Path, ranks_a_node: int) -> None:
    """With a rank a node, both fill: they wait for each other at the lock, as where nodes share a disk."""
    bad = write_chat_rows(tmp_path / "bad.jsonl", 3)
    bad.write_text(bad.read_text() + "{}\n")
    found = run_ranks(load_on_rank, 2, model, dataset, bad, tmp_path / "cache", ranks_a_node)
    expected = [
        example.ids.tolist() for example in load_examples(dataset, Tokenizer.from_folder(model), max_length=64).examples
    ]
    for ids, _, said in found:
        assert sorted(ids[0] + ids[1]) == sorted(expected)
        assert ids == found[0][0]
        assert said.startswith(f"{bad}:4: the fields fit no known format")
    # the rows that are good are tokenized once; the bad ones by the first rank of each node
    assert [fills for _, fills, _ in found] in ([[2, 0]] if ranks_a_node == 2 else [[2, 1], [1, 2]])


def test_small_datasets_need_no_cache(model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataCache, "dataset", lambda *_: pytest.fail("nobody asked for a cache"))
    world = World.single_process(torch.device("cpu"))
    train, _ = load_datasets(TrainConfig(model=str(model), dataset=str(dataset)), Tokenizer.from_folder(model), world)
    assert len(train.examples) == 22


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"max_steps": 3}, 24),
        ({"max_steps": 3, "eval_split": 0.25}, 32),
        ({"max_steps": 3, "packing": True, "max_length": 16}, None),
    ],
)
def test_a_stream_is_read_as_far_as_the_steps_take(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], rows: int | None
) -> None:
    """Steps of eight rows: the first chunks of four rows that hold enough for them."""
    monkeypatch.setattr("qsharded.data.chunks._ROWS", 4)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([json.loads(line) for line in write_chat_rows(tmp_path / "x", 200).open()]))
    given: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "streaming": True}
    config = TrainConfig(model=str(model), dataset=str(path), data_cache=str(tmp_path / "cache"), **given, **options)
    tokenizer, world = Tokenizer.from_folder(model), World.single_process(torch.device("cpu"))
    train, evaluation = load_datasets(config, tokenizer, world)
    found = [*train.examples, *(example for part in evaluation.values() for example in part.examples)]
    whole = load_examples(path, tokenizer, max_length=config.max_length).examples
    assert sorted(e.ids.tolist() for e in found) == sorted(e.ids.tolist() for e in whole[: len(found)])
    if rows is not None:
        assert len(found) == rows
    loader = datasets._training_loader(config, world, tokenizer, train, vocab_size=1 << 20)
    assert len({step.cursor.epoch for step in islice(loader.steps(), 3)} - {1}) <= 1
    assert len(found) < 200
