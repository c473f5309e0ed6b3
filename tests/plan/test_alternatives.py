"""Suggestions: they fit, the step before them does not, and a step keeps its rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qsharded.config import TrainConfig, parse
from qsharded.models import ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.plan.alternatives import Alternative, nearest
from qsharded.plan.gpu_memory import Planner
from tests.checkpoints import LLAMA

SHAPE = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "vocab_size": 32000}
CONFIG = TrainConfig(
    model="m",
    dataset="d",
    per_device_train_batch_size=6,
    gradient_accumulation_steps=1,
    activation_checkpointing="full",
)


PLANNER = Planner(ModelConfig.from_hf(SHAPE), LoRAConfig(r=8), torch.bfloat16)


def planner(gpu_bytes: int | None) -> Planner:
    """For a GPU of that size."""
    return replace(PLANNER, gpu_bytes=gpu_bytes)


def needed(ranks: int = 1, config: TrainConfig = CONFIG, **changes: Any) -> int:
    return PLANNER.plan(replace(config, **changes), ranks).needed


def suggested(gpu_bytes: int, config: TrainConfig = CONFIG) -> list[Alternative]:
    plans = planner(gpu_bytes)
    tight = plans.plan(config, 1)
    assert tight.fits is False
    found = nearest(plans, tight)
    assert all(one.plan.fits for one in found)
    return found


def test_the_largest_micro_batch_that_fits_keeps_the_steps_rows() -> None:
    words = "--per-device-train-batch-size 2 --gradient-accumulation-steps 3"
    assert words in [one.words for one in suggested(needed(per_device_train_batch_size=2))]
    assert words not in [one.words for one in suggested(needed(per_device_train_batch_size=2) - 1)]
    assert words not in [one.words for one in suggested(needed(per_device_train_batch_size=3))]


def test_the_fewest_gpus_that_fit() -> None:
    assert needed(ranks=4) < needed(ranks=3)
    assert "on 3 GPUs" in [one.words for one in suggested(needed(ranks=3))]
    assert "on 4 GPUs" in [one.words for one in suggested(needed(ranks=3) - 1)]


def test_the_longest_rows_that_fit() -> None:
    assert "--max-length 512" in [one.words for one in suggested(needed(max_length=512))]
    assert "--max-length 256" in [one.words for one in suggested(needed(max_length=512) - 1)]


def test_recomputation_comes_first() -> None:
    keeping = replace(CONFIG, activation_checkpointing="none")
    assert suggested(needed(), keeping)[0].words == "--activation-checkpointing full"
    selective = needed(activation_checkpointing="selective")
    assert suggested(selective, keeping)[0].words == "--activation-checkpointing selective"


def test_copies_of_the_weights_are_given_up_first() -> None:
    copies = replace(CONFIG, sharding="replicate")
    assert needed(2, copies) > needed(2)
    plans = planner(needed(2))
    assert nearest(plans, plans.plan(copies, 2))[0].words == "--sharding full"


def test_weights_move_to_the_host() -> None:
    words = [one.words for one in suggested(needed(cpu_offload=True))]
    assert "--cpu-offload" in words


def test_changes_are_combined_where_none_suffices() -> None:
    crowded = replace(CONFIG, activation_checkpointing="none", max_length=128)
    frugal = {"activation_checkpointing": "offloaded", "per_device_train_batch_size": 1, "cpu_offload": True}
    words = "--activation-checkpointing offloaded --per-device-train-batch-size 1 --gradient-accumulation-steps 6"
    least = needed(config=crowded, **frugal)
    assert [one.words for one in suggested(least, crowded)] == [f"{words} --cpu-offload"]
    more = [one.words for one in suggested(needed(2, crowded, **frugal), crowded)]
    assert more == [f"{words} --cpu-offload on 2 GPUs"]


def flat(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def test_every_suggestion_is_a_command_line_that_is_taken() -> None:
    asked = {"--model": "m", "--dataset": "d", "--per-device-train-batch-size": "6"}
    asked |= {"--activation-checkpointing": "none", "--sharding": "replicate"}
    copies = parse(flat(asked), TrainConfig)
    kept = {"sharding": "full", "activation_checkpointing": "full"}
    for gpu_bytes in (needed(config=copies, cpu_offload=True, **kept), needed(config=copies, **kept)):
        plans = planner(gpu_bytes)
        for one in nearest(plans, plans.plan(copies, 1)):
            flags = one.words.partition("on ")[0].split()
            kept_flags = {flag: value for flag, value in asked.items() if flag not in flags}
            assert parse([*flat(kept_flags), *flags], TrainConfig) == one.plan.config
            assert ("--cpu-offload" in flags) <= ("--sharding" in flags)


def test_gathered_layers_are_freed_before_more_is_given_up() -> None:
    kept = replace(CONFIG, reshard_after_forward="never")
    plans = planner(PLANNER.plan(CONFIG, 2).needed)
    assert "--reshard-after-forward always" in [one.words for one in nearest(plans, plans.plan(kept, 2))]
    small = planner(PLANNER.plan(replace(CONFIG, cpu_offload=True), 2).needed)
    words = [one.words for one in nearest(small, small.plan(kept, 2))]
    assert "--cpu-offload --reshard-after-forward always" in words


@pytest.mark.parametrize("gpu_bytes", [None, 10**12, 10**8])
def test_nothing_is_suggested_where_nothing_can_be(gpu_bytes: int | None) -> None:
    plans = planner(gpu_bytes)
    assert nearest(plans, plans.plan(CONFIG, 1)) == []


def test_a_plan_that_needs_all_of_a_gpu_fits_it() -> None:
    plan = PLANNER.plan(CONFIG, 2)
    assert replace(plan, gpu_bytes=plan.needed).fits
    assert not replace(plan, gpu_bytes=plan.needed - 1).fits
    assert plan.fits is None
