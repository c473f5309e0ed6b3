"""What a training run takes on a GPU before any of it is loaded: the bytes of every class, and whether they fit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from qsharded.checkpoint.load import skeleton
from qsharded.checkpoint.packed_format import PackedCheckpoint, StorageFormat
from qsharded.config import TrainConfig
from qsharded.distributed.choose_layout import Layout, choose_layout, frozen_bytes
from qsharded.lora.config import LoRAConfig
from qsharded.models import CausalLM, ModelConfig
from qsharded.models.choice import AnyConfig
from qsharded.plan import captured_layers
from qsharded.plan.activations import StepWork, step_work
from qsharded.plan.optimizer import pageable_bytes, state_bytes
from qsharded.plan.parameters import (
    ADAPTERS,
    CODES,
    EMBEDDING,
    OTHERS,
    SCALES,
    UNPACKED,
    Held,
    parameters,
    pinned_bytes,
)
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.utils.checkpointing_modes import Mode

Phase = Literal["loss", "backward of a layer", "backward of a checkpointed layer", "optimizer step"]
ALWAYS: tuple[Phase, ...] = ("loss", "backward of a layer", "backward of a checkpointed layer", "optimizer step")
_OPTIMIZER_STATE = "optimizer state"
_KEPT: tuple[Phase, ...] = ("loss", "backward of a layer")
# Where some layers are checkpointed and others are not, the backward of a layer is that of one of the others: they come
# first, and what they kept is gone when the checkpointed ones are computed again.
_CHECKPOINTED: Phase = "backward of a checkpointed layer"

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
class HostBytes:
    """What a rank keeps in host memory for the whole run: frozen weights, layers' inputs, and optimizer state."""

    weights: int = 0
    activations: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Plan:
    """The GPU memory of one rank.

    Attributes:
        config: the settings that were planned for.
        ranks: that share the model.
        rows: every class.
        gpu_bytes: of a GPU; None where it is not known.
        on_host: what lies in host memory instead.
    """

    config: TrainConfig
    ranks: int
    rows: tuple[Row, ...]
    gpu_bytes: int | None
    on_host: HostBytes = HostBytes()

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
    def reserved(self) -> int:
        """About what ``torch.cuda.max_memory_reserved`` will say."""
        return int(self.allocated * _RESERVED_OVER_ALLOCATED)

    @property
    def needed(self) -> int:
        """What the GPU must have: with what the allocator reserves beyond that, and with what lies outside of it."""
        return self.reserved + _OUTSIDE_BYTES

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
        packed: how the checkpoint packs its weights, if it does, and which, where it is there to say.
    """

    model_config: AnyConfig
    lora: LoRAConfig
    dtype: torch.dtype
    gpu_bytes: int | None = None
    packed: PackedCheckpoint | StorageFormat | None = None
    _simulated: dict[tuple[int, int, Mode, bool], StepWork] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def model(self) -> CausalLM:
        """The whole model on the meta device."""
        return skeleton(self.model_config, self.lora, self.dtype, self.packed)

    def plan(self, config: TrainConfig, ranks: int) -> Plan:
        """The memory of the rank that holds most, with rows of ``--max-length`` tokens.

        Raises:
            ValueError: ``--dp-replicate`` does not divide the ranks.
        """
        if ranks % config.dp_replicate:
            raise ValueError(f"--dp-replicate {config.dp_replicate} does not divide the {ranks} ranks")
        sharing = ranks // config.dp_replicate
        held = parameters(self.model, ranks=sharing, layout=self._layout(config, ranks), param_dtype=self._param_dtype)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        work = self._work(config, ranks, config.checkpointing.mode)
        checkpointed, layers = self._checkpointed(config), self.model_config.num_hidden_layers
        rows = [
            *_resident(held),
            _optimizer_state(state_bytes(trained, config.optim, ranks=sharing), config),
            *_gathers(held, layers if config.reshard_after_forward == "never" else 1),
            *_activations(work, layers if config.checkpointing.mode == "none" else checkpointed, config),
            *_optimizer_step(held, config, ranks),
        ]
        if 0 < checkpointed < layers:
            rows = _mixed(rows, self._work(config, ranks, "none"), layers - checkpointed)
        offloaded = checkpointed if config.checkpointing.mode == "offloaded" else 0
        boundaries = offloaded * pinned_bytes(work.boundary)
        on_gpu = tuple(row for row in rows if row.bytes)
        resident = Plan(config, ranks, on_gpu, self.gpu_bytes, on_host=HostBytes(held.pinned, boundaries))
        return _paged(resident, pageable_bytes(trained, config.optim, ranks=sharing))

    def _checkpointed(self, config: TrainConfig) -> int:
        return config.checkpointing.checkpointed(self.model_config.num_hidden_layers)

    def _work(self, config: TrainConfig, ranks: int, mode: Mode) -> StepWork:
        shape = (config.per_device_train_batch_size, config.max_length, mode, ranks > 1)
        if shape not in self._simulated:
            rows, length, mode, is_sharded = shape
            native = isinstance(self.model_config, ModelConfig)
            simulated: Callable[..., StepWork] = step_work if native else captured_layers.step_work
            self._simulated[shape] = simulated(
                self.model_config,
                self.lora,
                self.dtype,
                rows=rows,
                length=length,
                checkpointing=mode,
                is_sharded=is_sharded,
                quant_format=self._quant_format,
            )
        return self._simulated[shape]

    @property
    def _quant_format(self) -> QuantFormat:
        storage_format = self.packed.storage_format if isinstance(self.packed, PackedCheckpoint) else self.packed
        return storage_format.quant_format if storage_format else NF4_64

    def _layout(self, config: TrainConfig, ranks: int) -> Layout:
        # a GPU of unknown size is taken to be too small, which is the layout that needs less of it
        return choose_layout(config, ranks, frozen_bytes(self.model), lambda: self.gpu_bytes or 0)[0]

    @property
    def _param_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == torch.bfloat16 else None  # as load_model shards


_RESIDENT = {
    CODES: "this rank's part of the packed weights: 4 bits each",
    SCALES: "of their blocks: absmax, in 8 bits where it is quantized too",
    UNPACKED: "its part of matrices that stay in 16 or 32 bits",
    EMBEDDING: "its part, in 16 or 32 bits",
    OTHERS: "its part",
    ADAPTERS: "its part of all that is trained, in --lora-dtype",
}


def _resident(held: Held) -> list[Row]:
    return [
        *(Row(name, size, note=_RESIDENT[name]) for name, size in held.resident.items()),
        Row("gradients", held.resident[ADAPTERS], note="of what trains"),
        Row("library workspaces", _LIBRARY_BYTES, note="cuBLAS"),
    ]


def _optimizer_state(size: int, config: TrainConfig) -> Row:
    paged = "; what does not fit goes to host memory" if config.optim == "paged_adamw8bit" else ""
    return Row(_OPTIMIZER_STATE, size, note=f"--optim {config.optim}{paged}")


def _paged(resident: Plan, pageable: int) -> Plan:
    """The plan once as much optimizer state is in host memory as the GPU has no room for."""
    excess = 0 if resident.gpu_bytes is None else resident.needed - resident.gpu_bytes
    paged = min(pageable, math.ceil(max(0, excess) / _RESERVED_OVER_ALLOCATED) + 1)  # needed rounds down
    if excess <= 0 or not paged:
        return resident
    rows = tuple(
        replace(row, bytes=row.bytes - paged) if row.name == _OPTIMIZER_STATE else row for row in resident.rows
    )
    return replace(resident, rows=rows, on_host=replace(resident.on_host, optimizer=paged))


def _gathers(held: Held, layers: int) -> list[Row]:
    """``layers`` whole, and the buffer that the next one's shards arrive in. While embedding or head are gathered, the
    last such buffer is still there."""
    last = layers * held.layer + 2 * held.vocabulary
    whole = "a layer" if layers == 1 else f"{layers} layers, whole"
    in_loss = "embedding or head, whole" if held.vocabulary else "the last layer's"
    return [
        Row("gather buffers", last, ("loss",), in_loss if layers == 1 else whole),
        Row(
            "gather buffers", (layers + 1) * held.layer, ("backward of a layer",), f"{whole}, and the next one's buffer"
        ),
        Row("weights from the host", held.head_from_host, ("loss",), "the head"),
        Row("weights from the host", 2 * held.streamed, ("backward of a layer",), "a layer, and the next one"),
        Row("gradient reduction", held.layer_gradient, ("backward of a layer",), "a layer's, in fp32"),
    ]


_WORK = "layer's work"
_MODES = {"none": "all that a layer's backward reads", "selective": "all but the MLP's", "full": "a layer's input"}


def _activations(work: StepWork, layers: int, config: TrainConfig) -> list[Row]:
    mode, kept = config.checkpointing.mode, layers * work.layer.kept
    if mode == "offloaded":
        # one that runs, one on its way to the host or back, one that was allocated while the copy before had not ended
        kept = min(3, layers) * work.boundary + layers * (work.layer.kept - work.boundary)
        note = f"three of {layers} layers' inputs; the others in host memory"
    else:
        note = f"{_MODES[mode]}, {layers} times, and what they share"
    return [
        Row("activations", kept + work.shared, _KEPT, note),
        Row(_WORK, work.layer.passing, ("backward of a layer",), "what backward takes of one"),
        Row("logits and loss", work.loss.passing + work.loss.kept, ("loss",), "a chunk of logits, hidden states"),
    ]


def _mixed(rows: list[Row], whole: StepWork, layers: int) -> list[Row]:
    """The rows of a model whose last ``layers`` keep all."""
    mixed = []
    for row in rows:
        if row.name == _WORK:
            mixed += [replace(row, bytes=whole.layer.passing), replace(row, phases=(_CHECKPOINTED,))]
        elif "backward of a layer" in row.phases and row.phases != ALWAYS:
            mixed.append(replace(row, phases=(*row.phases, _CHECKPOINTED)))
        else:
            mixed.append(row)
    note = f"{_MODES['none']}, {layers} times: of the last layers"
    return [*mixed, Row("activations", layers * whole.layer.kept, _KEPT, note)]


def _optimizer_step(held: Held, config: TrainConfig, ranks: int) -> list[Row]:
    """torch's AdamW takes the root of all second moments at once where its parameters are plain tensors; ours has no
    room of its own."""
    roots = held.resident[ADAPTERS] if config.optim == "adamw" and ranks == 1 else 0
    return [Row("optimizer's work", roots, ("optimizer step",), "roots of the second moments")]
