from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded.checkpoint.load import skeleton
from qsharded.checkpoint.packed_format import StorageFormat
from qsharded.config import TrainConfig
from qsharded.models import CausalLM, ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.plan.gpu_memory import Planner
from qsharded.plan.host_memory import disk, host_memory
from qsharded.plan.parameters import parameters
from qsharded.quant.formats import QuantFormat
from tests.checkpoints import LLAMA

R = 4
# q and o: 128x128, k and v: 64x128, gate and up: 192x128, down: 128x192; two layers, fp32
ADAPTER = 2 * R * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 192)) * 4
WEIGHTS = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192) + 2 * 97 * 128 + 5 * 128
# fp32 moments of parameters under 4096 values, which all of these are, by blocks of 256 values, and a counter each: in
# a matrix of R rows R * 64, R * 128 or R * 192 values are 1, 2 or 3 blocks
BLOCKS = 2 * (2 * (2 + 2) + 2 * (2 + 1) + 3 * (2 + 3))
CHECKPOINT = ADAPTER + BLOCKS * 2 * 256 * 4 + 2 * 14 * 4
CONFIG = TrainConfig(model="some/model", dataset="d", activation_checkpointing="full")


@pytest.fixture
def model() -> CausalLM:
    return skeleton(ModelConfig.from_hf(LLAMA), LoRAConfig(r=R), torch.bfloat16)


def needs(built: CausalLM, described: dict[str, Any] = LLAMA, **changes: Any) -> dict[str, int]:
    return {need.name: need.bytes for need in disk(built, replace(CONFIG, **changes), described)}


def test_an_adapter_and_its_checkpoints_take_disk(model: CausalLM) -> None:
    assert needs(model)["adapter"] == ADAPTER
    assert needs(model)["checkpoints"] == CHECKPOINT
    assert needs(model, optim="adamw")["checkpoints"] == 3 * ADAPTER
    assert needs(model, max_steps=1000, save_steps=300)["checkpoints"] == 3 * CHECKPOINT
    assert needs(model, save_total_limit=2)["checkpoints"] == 3 * CHECKPOINT  # one more, while it is written
    assert "checkpoints" not in needs(model, save_steps=0)


def test_a_model_of_the_hub_is_downloaded_in_its_dtype(model: CausalLM, tmp_path: Path) -> None:
    assert needs(model)["download"] == 2 * WEIGHTS
    assert needs(model, LLAMA | {"torch_dtype": "float32"})["download"] == 4 * WEIGHTS
    assert "download" not in needs(model, model=str(tmp_path))
    assert "download" not in needs(model, random_init=True)


def test_a_packed_model_of_the_hub_is_downloaded_packed() -> None:
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192)
    for double_quant, scales in ((True, linear // 64), (False, linear // 64 * 4)):
        built = skeleton(
            ModelConfig.from_hf(LLAMA), LoRAConfig(r=R), torch.bfloat16, StorageFormat("qsharded", double_quant)
        )
        found = {need.name: need.bytes for need in disk(built, CONFIG, LLAMA, is_packed=True)}
        second_level = 2 * 4 * (1 + 1 + 1 + 1 + 2 + 2 + 2) if double_quant else 0  # a figure for 256 blocks
        assert found["download"] == linear // 2 + scales + second_level + 2 * (WEIGHTS - linear)


@pytest.mark.parametrize("block_size", [32, 128])
def test_a_packed_model_of_another_kind_is_counted_with_its_scales(block_size: int) -> None:
    """down_proj, of 192 columns, stays in 16 bits where blocks are of 128."""
    plain = 2 * 128 * 192 if block_size == 128 else 0
    packed = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192) - plain
    storage_format = StorageFormat("qsharded", quant_format=QuantFormat("fp4", block_size))
    built = skeleton(ModelConfig.from_hf(LLAMA), LoRAConfig(r=R), torch.bfloat16, storage_format)
    found = {need.name: need.bytes for need in disk(built, CONFIG, LLAMA, is_packed=True)}
    # 128x128, 64x128 and 192x128 in blocks of 32 have 512, 256, 768 scales, and down_proj 768; of 128: a quarter
    second_level = 2 * 4 * (2 * 2 + 2 * 1 + 3 * 3 if block_size == 32 else 2 * 1 + 2 * 1 + 2 * 1)
    assert found["download"] == packed // 2 + packed // block_size + second_level + 2 * (WEIGHTS - packed)
    held = parameters(built, ranks=1).resident
    assert held["codes"] == packed // 2
    rows = 2 * (2 * 128 + 2 * 64 + 2 * 192 + (0 if plain else 128))
    padding = rows if block_size == 128 else 0  # a row of one block
    assert held["scales"] == packed // block_size + padding + second_level + 2 * 4 * (6 if plain else 7)


def on_host(ranks: int, **changes: Any) -> dict[str, int]:
    planner = Planner(ModelConfig.from_hf(LLAMA), LoRAConfig(r=R), torch.bfloat16)
    plan = planner.plan(replace(CONFIG, **changes), ranks)
    return {need.name: need.bytes for need in host_memory(planner.model, plan)}


def test_the_copy_for_a_checkpoint_is_a_ranks_own() -> None:
    assert on_host(1)["checkpoint's copy"] == CHECKPOINT
    assert on_host(1, optim="adamw")["checkpoint's copy"] == 3 * ADAPTER
    assert on_host(2, optim="adamw")["checkpoint's copy"] == 3 * ADAPTER // 2
    assert on_host(4, dp_replicate=2, optim="adamw")["checkpoint's copy"] == 3 * ADAPTER // 2


def test_what_is_offloaded_lies_in_host_memory() -> None:
    assert not {"frozen weights", "activations"} & on_host(2).keys()
    offloaded = on_host(2, cpu_offload=True, activation_checkpointing="offloaded", max_length=64)
    inputs = 4 * 64 * 128 * 2  # of a block: rows x tokens x hidden size in bf16
    assert offloaded["activations"] == 2 * inputs
    # page-locked memory comes in powers of two: half of q, o: 64 rows of 64 bytes of codes; k, v: 32 of them; gate, up:
    # 96, rounded up to 128; down: 64 rows of 96 bytes, to 128
    codes = 2 * 2**12 + 2 * 2**11 + 2 * 2**13 + 2**13
    # 2 bytes of absmax a row, 4 (in whole words) for the 3 blocks of down's: 96 rows again as 128
    absmax = 2 * 2**7 + 2 * 2**6 + 2 * 2**8 + 2**8
    norms = 2 * 64 * 2
    # embedding and head: rank 0 has 49 of 97 rows, 12,544 bytes
    assert offloaded["frozen weights"] == 2 * (codes + absmax + norms) + 2 * 2**14


def test_8_bits_take_a_quarter_of_fp32_in_a_checkpoint() -> None:
    built = skeleton(ModelConfig.from_hf(LLAMA), LoRAConfig(r=256), torch.bfloat16)
    values = 256 * 2 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 192))
    eight_bits = values * 2 + values // 256 * 2 * 4 + 2 * 14 * 4  # two codes a value, two scales a block, counters
    assert needs(built)["checkpoints"] == values * 4 + eight_bits


def test_state_that_does_not_fit_pages_before_the_verdict() -> None:
    config, planner = CONFIG, Planner(ModelConfig.from_hf(LLAMA), LoRAConfig(r=16384), torch.bfloat16)
    values = 16384 * 2 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 192))
    pageable = values * 2 + values // 256 * 2 * 4 - 2 * 2**25
    resident = planner.plan(config, 1)
    assert resident.on_host.optimizer == 0
    short = replace(planner, gpu_bytes=resident.needed - 2**20).plan(config, 1)
    assert short.fits
    assert 2**20 / 1.05 <= short.on_host.optimizer < 2**20
    assert resident.allocated - short.allocated == short.on_host.optimizer
    found = {need.name: need.bytes for need in host_memory(planner.model, short)}
    assert found["optimizer state"] == short.on_host.optimizer
    tiny = replace(planner, gpu_bytes=2**20).plan(config, 1)
    assert not tiny.fits
    assert tiny.on_host.optimizer == pageable
    kept = replace(planner, gpu_bytes=resident.needed - 2**20).plan(replace(config, optim="adamw8bit"), 1)
    assert not kept.fits
    assert kept.on_host.optimizer == 0
