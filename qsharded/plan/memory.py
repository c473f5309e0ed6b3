"""What a training run takes on a GPU before any of it is loaded: the bytes of every class, and whether they fit."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from qsharded.checkpoint.load import skeleton
from qsharded.config import TrainConfig
from qsharded.models import CausalLM, ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.plan.parameters import ADAPTERS, Parameters, parameters
from qsharded.plan.step import StepWork, step_work

Phase = Literal["loss", "backward of a block", "optimizer step"]
ALWAYS: tuple[Phase, ...] = ("loss", "backward of a block", "optimizer step")
_KEPT: tuple[Phase, ...] = ("loss", "backward of a block")

# PyTorch gives cuBLAS 32 MiB of its own memory for each thread that multiplies: forward's and backward's (sm_90).
_LIBRARY_BYTES = 2 * 32 * 2**20
# What never shows in PyTorch's figures, an estimate: CUDA's context with its loaded kernels, and NCCL's buffers.
_OUTSIDE_BYTES = int(0.7 * 2**30)
# PyTorch's allocator reserves more than is allocated: blocks are cut to fit, and streams do not share them. An estimate
# too; benchmarks/plan.py measures all three.
_RESERVED_OVER_ALLOCATED = 1.05


@dataclass(frozen=True)
class Row:
    """Bytes of one class on a rank, and the phases of a step in which they are there."""

    name: str
    bytes: int
    phases: tuple[Phase, ...] = ALWAYS
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The GPU memory of one rank.

    Attributes:
        config: the settings that were planned for.
        ranks: that share the model.
        rows: every class.
        gpu_bytes: of a GPU; None where it is not known.
    """

    config: TrainConfig
    ranks: int
    rows: tuple[Row, ...]
    gpu_bytes: int | None

    def of_phase(self, phase: Phase) -> int:
        """Bytes allocated at the worst moment of a phase."""
        return sum(row.bytes for row in self.rows if phase in row.phases)

    @property
    def peak_phase(self) -> Phase:
        """The phase that allocates most."""
        return max(ALWAYS, key=self.of_phase)

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` will say."""
        return self.of_phase(self.peak_phase)

    @property
    def needed(self) -> int:
        """What the GPU must have: with what the allocator reserves beyond that, and with what lies outside of it."""
        return int(self.allocated * _RESERVED_OVER_ALLOCATED) + _OUTSIDE_BYTES

    @property
    def fits(self) -> bool | None:
        """Whether a GPU holds it; None where the GPU is not known."""
        return None if self.gpu_bytes is None else self.needed <= self.gpu_bytes


@dataclass(frozen=True)
class Planner:
    """Plans runs of one model, of which it keeps what does not change with the settings.

    Args:
        model_config: the model.
        lora: its adapters.
        dtype: of the activations, and of what is not quantized.
        gpu_bytes: of each GPU; None where it is not known.
    """

    model_config: ModelConfig
    lora: LoRAConfig
    dtype: torch.dtype
    gpu_bytes: int | None = None

    @cached_property
    def model(self) -> CausalLM:
        """The whole model on the meta device."""
        return skeleton(self.model_config, self.lora, self.dtype)

    def plan(self, config: TrainConfig, ranks: int) -> Plan:
        """The memory of the rank that holds most, with rows of ``--max-length`` tokens."""
        held = parameters(self.model, ranks=ranks, param_dtype=self._param_dtype)
        work = step_work(
            self.model_config,
            self.lora,
            self.dtype,
            rows=config.per_device_train_batch_size,
            length=config.max_length,
            gradient_checkpointing=config.gradient_checkpointing,
            is_sharded=ranks > 1,
        )
        blocks = self.model_config.num_hidden_layers
        rows = [*_resident(held), *_gathers(held), *_activations(work, blocks, config), *_optimizer_step(held)]
        return Plan(config, ranks, tuple(row for row in rows if row.bytes), self.gpu_bytes)

    @property
    def _param_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == torch.bfloat16 else None  # as load_model shards


def _resident(held: Parameters) -> list[Row]:
    trained = held.resident[ADAPTERS]
    return [
        *(Row(name, size) for name, size in held.resident.items()),
        Row("gradients", trained, note="of what trains"),
        Row("optimizer state", 2 * trained, note="AdamW: two averages of the adapters' dtype"),
        Row("library workspaces", _LIBRARY_BYTES, note="cuBLAS"),
    ]


def _gathers(held: Parameters) -> list[Row]:
    """A gathered block, and beside it the buffer that the next one's shards arrive in. While embedding or head are
    gathered whole, the buffer of the last block is still there."""
    whole = held.block + 2 * held.vocabulary if held.vocabulary else held.block
    return [
        Row("gather buffers", whole, ("loss",), "embedding or head, whole" if held.vocabulary else "a block"),
        Row("gather buffers", 2 * held.block, ("backward of a block",), "a block, and the next one's buffer"),
        Row("gradient reduction", held.block_gradient, ("backward of a block",), "a block's, in fp32"),
    ]


def _activations(work: StepWork, blocks: int, config: TrainConfig) -> list[Row]:
    mode = "a block's input" if config.gradient_checkpointing else "all of a block's"
    block = work.block
    return [
        Row("activations", blocks * block.kept + work.shared, _KEPT, f"{mode}, {blocks} times, and masks"),
        Row("decode workspace", block.decoded, ("backward of a block",), "the largest weight in 16 bits"),
        Row("block's work", block.passing - block.decoded, ("backward of a block",), "what backward takes of one"),
        Row("logits and loss", work.loss.passing + work.loss.kept, ("loss",), "a chunk of logits, hidden states"),
    ]


def _optimizer_step(held: Parameters) -> list[Row]:
    # torch's AdamW takes the root of all second moments at once where its parameters are plain tensors
    return [Row("optimizer's work", held.resident[ADAPTERS], ("optimizer step",), "roots of the second moments")]


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
    return Planner(model_config, lora, dtype, gpu_bytes).plan(train_config, ranks)
