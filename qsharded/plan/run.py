"""The plan of a run from its settings alone."""

import torch

from qsharded.config import TrainConfig
from qsharded.lora.config import LoRAConfig
from qsharded.models import ModelConfig
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Plan, Planner


def plan(
    model_config: ModelConfig,
    train_config: TrainConfig,
    ranks: int,
    *,
    lora: LoRAConfig,
    dtype: torch.dtype = torch.bfloat16,
    gpu_bytes: int | None = None,
) -> Plan:
    """The GPU memory of one rank of ``ranks`` that train so; nothing is loaded, and no GPU is needed."""
    planner = Planner(model_config, lora, dtype, gpu_bytes)
    config, _ = choose_checkpointing(planner, train_config, ranks)
    return planner.plan(config, ranks)
