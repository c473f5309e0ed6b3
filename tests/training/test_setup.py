"""What a run is made with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsharded.checkpoint.load import Outline, skeleton
from qsharded.config import TrainConfig
from qsharded.data import Tokenizer
from qsharded.distributed.choose_layout import Layout, frozen_bytes
from qsharded.distributed.world import World
from qsharded.models import ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.training import datasets, memory_choices, setup
from qsharded.training.memory_choices import MemoryChoices, choose_memory
from tests.checkpoints import LLAMA, write_checkpoint
from tests.data.folders import chat, make_folder, write_rows
from tests.data.templates import THINKING

MODEL, LORA = ModelConfig.from_hf(LLAMA), LoRAConfig(r=4)


def layout(memory: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Layout, str]:
    """What two ranks of so many bytes each choose."""
    monkeypatch.setattr(setup, "least_memory", lambda world: memory)
    config = TrainConfig(model="m", dataset="d", **options)
    frozen = frozen_bytes(skeleton(MODEL, LORA, torch.float32))
    return setup._layout(config, World(0, 2, torch.device("cpu"), object()), frozen)


@pytest.mark.parametrize("kept", [False, True])
def test_the_summary_says_what_the_chat_template_leaves_out(tmp_path: Path, kept: bool) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=THINKING))
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": chat("a", "<think>\nwhy\n</think>\n\nb", "c", "d")})
    config = TrainConfig(model="m", dataset=str(rows), eval_dataset=str(rows), one_example_per_answer=kept)
    parts: Any = SimpleNamespace(model=skeleton(MODEL, LORA, torch.float32), lora=LORA)
    world = World.single_process(torch.device("cpu"))
    data = datasets.read_data(config, world, tokenizer, 10**6, None)
    assert len(data.train.examples) == (2 if kept else 1)
    notes = [line for line in setup._summary(config, world, parts, data, None) if "leaves" in line]
    assert [f"{rows}:1, message 1: 'why'" in note for note in notes] == ([] if kept else [True, True])


def test_auto_replicates_what_takes_less_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = frozen_bytes(skeleton(MODEL, LORA, torch.float32))
    # 2 blocks of 128 x 128, 64 x 128, 64 x 128, 128 x 128 and 3 of 192 x 128 weights, each in half a byte and 1/64 byte
    # of absmax codes (padded to 2 bytes a row, of 2 or 3 of them); norms; embedding and head
    rows = {128: 128 + 64 + 64 + 128 + 192 + 192, 192: 128}
    packed = sum(count * (columns // 2 + 2 * -(-columns // 128)) for columns, count in rows.items())
    assert frozen == 2 * (packed + 2 * 128 * 4) + 128 * 4 + 2 * 97 * 128 * 4
    chosen, why = layout(2 * frozen, monkeypatch, sharding="auto")
    assert chosen == Layout(replicated=True)
    assert why.startswith("sharding: replicated, as the frozen weights take 0.0 of a rank's 0.0 GiB, less than half")
    chosen, why = layout(2 * frozen - 2, monkeypatch, sharding="auto")
    assert chosen == Layout()
    assert why.startswith("sharding: cut over 2 ranks")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Layout()),
        ({"sharding": "replicate"}, Layout(replicated=True)),
        ({"cpu_offload": True}, Layout(on_host=True)),
    ],
)
def test_what_is_given_is_taken_without_a_word(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: Layout
) -> None:
    assert layout(1 << 40, monkeypatch, **options) == (expected, "")


@pytest.mark.parametrize(
    ("options", "expected", "reason"),
    [
        ({"cpu_offload": True}, Layout(on_host=True), "sharding: full, as --cpu-offload leaves"),
        ({"dp_replicate": 2}, Layout(), "sharding: full, as --dp-replicate 2 leaves"),
    ],
)
def test_auto_says_what_decides_in_its_place(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: Layout, reason: str
) -> None:
    chosen, why = layout(1 << 40, monkeypatch, sharding="auto", **options)
    assert chosen == expected
    assert reason in why


@pytest.mark.parametrize(
    ("room", "expected"), [(1 << 40, "none, the fastest that the plan says fits 1024.0 GiB"), (1, "full, the fastest")]
)
def test_auto_keeps_what_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, expected: str
) -> None:
    monkeypatch.setattr(memory_choices, "least_free_memory", lambda world: room)
    outline = Outline.of(write_checkpoint(tmp_path), LORA, torch.float32, random_init=False)
    config = TrainConfig(model="m", dataset="d")
    choices = choose_memory(config, World.single_process(torch.device("cpu")), outline, LORA)
    assert choices.why.startswith(f"activation checkpointing: {expected}")
    assert choices.config.checkpointing.mode == expected.split(",")[0]
    assert choices.plan is None  # it is of GPUs


def test_checkpointing_that_is_given_is_taken_without_a_word() -> None:
    config = TrainConfig(model="m", dataset="d", activation_checkpointing="offloaded", checkpointed_layers=3)
    outline: Any = None
    choices = choose_memory(config, World.single_process(torch.device("cpu")), outline, LORA)
    assert choices == MemoryChoices(config, "", None)


def test_on_a_gpu_the_plan_is_kept_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_choices, "least_free_memory", lambda world: 1 << 40)
    outline = Outline.of(write_checkpoint(tmp_path), LORA, torch.bfloat16, random_init=False)
    config = TrainConfig(model="m", dataset="d", activation_checkpointing="full")
    choices = choose_memory(config, World(0, 2, torch.device("cuda"), None), outline, LORA)
    assert choices.plan is not None
    assert choices.plan.ranks == 2
    assert choices.plan.reserved == int(choices.plan.allocated * 1.05) > 0
    assert choose_memory(config, World(1, 2, torch.device("cuda"), None), outline, LORA).plan is None
