"""How a run uses a GPU's memory, where its options leave that open, and what is planned of it."""

from contextlib import suppress
from dataclasses import dataclass

from qsharded.checkpoint.load import Outline
from qsharded.config import TrainConfig
from qsharded.distributed.choose_layout import free_host_memory, least_free_memory
from qsharded.distributed.world import World
from qsharded.lora.config import LoRAConfig
from qsharded.plan.captured_layers import CannotPlan
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Plan, Planner


@dataclass(frozen=True)
class MemoryChoices:
    """The settings with all chosen that was left open of memory for speed, and why; and the plan of a GPU's memory on
    the main rank, which writes it down: None elsewhere, on CPUs, and of models that cannot be planned."""

    config: TrainConfig
    why: str
    plan: Plan | None


def choose_memory(config: TrainConfig, world: World, outline: Outline, lora: LoRAConfig) -> MemoryChoices:
    """Choose for the model of ``outline``. Every rank calls this."""
    is_gpu = world.device.type == "cuda"
    if config.activation_checkpointing != "auto" and not is_gpu:
        return MemoryChoices(config, "", None)
    planner = Planner(outline.model.config, lora, outline.dtype, least_free_memory(world), outline.packed)
    chosen, why = choose_checkpointing(planner, config, world.size, free_host_memory() if is_gpu else None)
    plan = planned(planner, chosen, world.size) if is_gpu and world.is_main else None
    return MemoryChoices(chosen, why, plan)


def planned(planner: Planner, config: TrainConfig, ranks: int) -> Plan | None:
    """The plan, or None of a model that cannot be planned."""
    with suppress(CannotPlan):
        return planner.plan(config, ranks)
    return None
