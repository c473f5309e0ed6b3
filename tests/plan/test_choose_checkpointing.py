"""What "auto" becomes on GPUs of every size."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qsharded.config import TrainConfig
from qsharded.lora.config import LoRAConfig
from qsharded.models import ModelConfig
from qsharded.plan.alternatives import nearest
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Planner
from qsharded.utils.checkpointing_modes import KEEP_ALL, Checkpointing
from tests.checkpoints import LLAMA

LAYERS = 6
PLANNER = Planner(ModelConfig.from_hf(LLAMA | {"num_hidden_layers": LAYERS}), LoRAConfig(r=8), torch.bfloat16)
CONFIG = TrainConfig(model="m", dataset="d", max_length=512)
PLENTY = 2**40


def needed(**changes: Any) -> int:
    return PLANNER.plan(replace(CONFIG, **changes), 1).needed


def chosen(gpu_bytes: int | None, host_bytes: int | None = None, **changes: Any) -> Checkpointing:
    planner = replace(PLANNER, gpu_bytes=gpu_bytes)
    return choose_checkpointing(planner, replace(CONFIG, **changes), 1, host_bytes)[0].checkpointing


NONE, FULL, OFFLOADED = ({"activation_checkpointing": mode} for mode in ("none", "full", "offloaded"))


def test_all_is_kept_where_it_fits() -> None:
    assert chosen(needed(**NONE)) == KEEP_ALL
    assert chosen(needed(**NONE) - 1) == Checkpointing("full", 1)


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("layers", range(1, LAYERS))
def test_as_few_layers_are_checkpointed_as_fit(layers: int, less: int) -> None:
    sizes = [needed(**FULL, checkpointed_layers=count) for count in range(1, LAYERS + 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    room = sizes[layers - 1] - less
    fewest = next((count for count, size in enumerate(sizes, 1) if size <= room), None)
    assert chosen(room) == Checkpointing("full", fewest)


def test_the_last_layer_keeps_all_for_nothing() -> None:
    """Its backward comes first: what it would compute again then is there from the start."""
    assert needed(**FULL, checkpointed_layers=LAYERS - 1) == needed(**FULL)
    assert chosen(needed(**FULL)) == Checkpointing("full", LAYERS - 1)


def test_all_layers_where_nothing_fits() -> None:
    assert chosen(1) == Checkpointing("full")


def test_inputs_go_to_the_host_where_that_keeps_more_layers() -> None:
    mixed = needed(**OFFLOADED, checkpointed_layers=LAYERS - 1)
    assert chosen(mixed, None).mode == "full"
    assert chosen(mixed, PLENTY) == Checkpointing("offloaded", LAYERS - 1)
    inputs = (LAYERS - 1) * 2**20  # 4 rows of 512 tokens of 128 values of 2 bytes, of which half of the host may be
    assert chosen(mixed, 2 * inputs // 2) == Checkpointing("offloaded", LAYERS - 1)
    assert chosen(mixed, 2 * inputs // 2 - 1).mode == "full"
    assert chosen(needed(**FULL) - 1, PLENTY).mode == "offloaded"


def test_optimizer_state_does_not_give_way_to_activations() -> None:
    big = replace(PLANNER, lora=LoRAConfig(r=8192))
    whole = big.plan(replace(CONFIG, **NONE), 1)
    short = replace(big, gpu_bytes=whole.needed - 2**20)
    assert short.plan(replace(CONFIG, **NONE), 1).on_host.optimizer > 0
    assert choose_checkpointing(short, CONFIG, 1)[0].activation_checkpointing == "full"


def test_weights_on_the_host_are_asked_for_again_by_all_layers() -> None:
    assert chosen(PLENTY, PLENTY, cpu_offload=True) == Checkpointing("full")
    frugal = needed(**FULL, cpu_offload=True) - 1
    assert chosen(frugal, PLENTY, cpu_offload=True) == Checkpointing("offloaded")


def test_a_gpu_that_is_not_known_keeps_least() -> None:
    settings, line = choose_checkpointing(PLANNER, CONFIG, 1, PLENTY)
    assert settings.checkpointing == Checkpointing("full")
    assert line == "activation checkpointing: full, as the GPU is not known"


def test_what_the_user_says_stays() -> None:
    settings = replace(CONFIG, activation_checkpointing="selective", checkpointed_layers=2)
    assert choose_checkpointing(replace(PLANNER, gpu_bytes=1), settings, 1) == (settings, "")


def test_the_choice_is_told() -> None:
    planner = replace(PLANNER, gpu_bytes=needed(**FULL, checkpointed_layers=4))
    line = choose_checkpointing(planner, CONFIG, 1)[1]
    size = f"{planner.gpu_bytes / 2**30:.1f} GiB"
    assert line == (
        "activation checkpointing: full for the first 4 of 6 layers, the others keep all, the fastest that the plan "
        f"says fits {size}"
    )


def test_a_mixed_checkpointing_gives_way_to_one_of_all_layers() -> None:
    mixed = replace(CONFIG, **FULL, checkpointed_layers=1)
    planner = replace(PLANNER, gpu_bytes=needed(**FULL))
    words = [one.words for one in nearest(planner, planner.plan(mixed, 1))]
    assert words[0] == "with all layers checkpointed"


def gathered(gpu_bytes: int | None, ranks: int = 2, **changes: Any) -> str:
    planner = replace(PLANNER, gpu_bytes=gpu_bytes)
    settings, _ = choose_checkpointing(planner, replace(CONFIG, **FULL, **changes), ranks)
    assert settings.activation_checkpointing == "full"
    return settings.reshard_after_forward


def test_layers_stay_gathered_where_all_fit() -> None:
    config = replace(CONFIG, **FULL, reshard_after_forward="never")
    enough = PLANNER.plan(config, 2).needed
    assert enough > PLANNER.plan(replace(CONFIG, **FULL), 2).needed
    assert gathered(enough) == "never"
    assert gathered(enough - 1) == "auto"


@pytest.mark.parametrize(
    ("gpu_bytes", "changes"),
    [
        (None, {}),
        (PLENTY, {"ranks": 1}),
        (PLENTY, {"dp_replicate": 2}),
        (PLENTY, {"cpu_offload": True}),
    ],
)
def test_layers_are_freed_where_nothing_is_gathered_or_known(gpu_bytes: int | None, changes: dict[str, Any]) -> None:
    assert gathered(gpu_bytes, **changes) == "auto"
    assert gathered(PLENTY, reshard_after_forward="always") == "always"
