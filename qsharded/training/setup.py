"""What a training run is made of, prepared in the order in which mistakes are cheapest to find: data, then model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from qsharded.checkpoint.adapter import load_adapter, trainable
from qsharded.checkpoint.base_identity import BaseIdentity
from qsharded.checkpoint.initial_adapter import copy_initial, initial_of, write_initial
from qsharded.checkpoint.load import Outline, parameter_count
from qsharded.checkpoint.resume import ADAPTER, Progress, load_checkpoint
from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.base_model import base_note, find_adapter, lora_config, trained_tokenizer
from qsharded.cli.command import compute_dtype
from qsharded.config import TrainConfig
from qsharded.config.builtin import builtin_note
from qsharded.data import Prompt, StepLoader, Tokenizer
from qsharded.data.mixture import refuse_overlaps
from qsharded.data.prompts import TEXT_FILE
from qsharded.data.row_source import files_of
from qsharded.data.template_options import OPTIONS_FILE, TEMPLATE
from qsharded.data.window_loader import WindowLoader
from qsharded.distributed.agreement import found_by_main, groups_of, refused_by_all
from qsharded.distributed.choose_layout import (
    Layout,
    choose_layout,
    frozen_bytes,
    least_memory,
)
from qsharded.distributed.layer_twin import LayerTwin
from qsharded.distributed.world import World, mesh_of
from qsharded.lora.config import LoRAConfig
from qsharded.models import CausalLM
from qsharded.optim import AdamW, PagedAdamW8bit, ScaledOptimizer
from qsharded.plan.gpu_memory import Plan
from qsharded.report import png
from qsharded.training.balanced import objective_of
from qsharded.training.calibration import calibrated_base, fill_adapters, residual_adapters
from qsharded.training.data_options import template_options
from qsharded.training.datasets import RunData, eval_loaders, read_data
from qsharded.training.disk_room import Sizes
from qsharded.training.finished import end_if_finished
from qsharded.training.memory_choices import choose_memory
from qsharded.training.resuming import Made, Resumed
from qsharded.training.run_folder import check_output_dir, check_room, claim_output_dir, find_resumed
from qsharded.training.run_record import RunFacts, write_record
from qsharded.training.self_check import self_check
from qsharded.training.stopping import Stopping
from qsharded.training.tokenized import eval_dataset_split
from qsharded.training.trackers import refuse_missing
from qsharded.training.watchdog import collective_timeout
from qsharded.utils import heartbeat
from qsharded.utils.untrusted_json import read_json


@dataclass
class TrainingSetup:
    """Everything that the training loop works with."""

    model: CausalLM
    tokenizer: Tokenizer
    lora: LoRAConfig
    optimizer: ScaledOptimizer
    loader: StepLoader | WindowLoader
    eval_loaders: Mapping[str, StepLoader]
    prompts: Sequence[Prompt]
    samples: Sequence[Prompt]
    total_steps: int
    base_model: str
    progress: Progress
    stopping: Stopping
    summary: list[str] = field(default_factory=list)
    late_notes: Callable[[], Sequence[str]] = tuple

    def epochs_done(self) -> float:
        """Passes over the data so far, with their fraction; of streams, how much of what the run takes of them."""
        epoch, loader = self.progress.epoch, self.loader
        if isinstance(loader, WindowLoader):
            return self.progress.step / self.total_steps
        return epoch + self.progress.row / (loader.steps_in_epoch(epoch) * loader.rows_per_step)


def prepare(config: TrainConfig, world: World) -> TrainingSetup:
    """Read the data, build the model, find where the run stands; what an earlier run left is only then replaced.

    Raises:
        ValueError: a mistake of the user's, named.
        AlreadyFinished: there is nothing left to do.
        SelfCheckFailed: this machine computes something else than the model.
    """
    found_by_main(world, partial(refuse_missing, config.report_to))
    if config.report_png:
        found_by_main(world, partial(png.refuse_missing, "--report-png"))
    resume_from = find_resumed(config, world)
    check_output_dir(config, world, resume_from)
    resumed = Resumed.read(resume_from, world)
    base = _read_base(config, world)
    check_room(config, world, resume_from, base.sizes(config))
    vocab_size = base.outline.model.config.vocab_size
    data = read_data(config, world, base.tokenizer, vocab_size, resumed)
    world.barrier()  # ranks that are still reading rows must not be waited for in a collective of the loading
    original = base.folder
    if config.calibrate:
        calibrated = calibrated_base(config, world, original, data.train, vocab_size)
        config = replace(config, model=str(calibrated), revision=None)
        base = _read_base(config, world)
    made = Made(config, data.loader.rows_per_step, data.train, base.tokenizer, base.folder)
    progress, notes = made.progress(world, resumed)
    total_steps = _total_steps(config, data.loader)
    end_if_finished(config, world, resume_from, progress, total_steps)
    if base.adapter and not resumed:
        notes += found_by_main(world, lambda: _base_notes(config, base, progress))
    begins = config.lora_init == "residual" and resumed is None
    first = residual_adapters(config, world, base.outline, original, data.train) if begins else None
    chosen = choose_memory(config, world, base.outline, base.lora)
    twin = LayerTwin(base.outline.model)
    model, why_layout = _load_model(chosen.config, world, base)
    if first:
        fill_adapters(model, first)
    setup = _setup(config, world, base, data, model, progress, total_steps)
    if resume_from:
        load_checkpoint(resume_from, model, base.lora, setup.optimizer)
    checked = self_check(config, world, model, twin)
    claim_output_dir(config, world, resume_from)
    progress.initial = found_by_main(world, partial(_keep_initial, config, base, progress, first, resume_from))
    write_record(config, world, _facts(base, data, setup, chosen.plan))
    setup.summary = _summary(config, world, setup, data, resume_from)
    setup.summary += [line for line in (why_layout, chosen.why, data.note, *notes, checked) if line]
    return setup


@dataclass(frozen=True)
class _Base:
    """The model that is trained on, of which no weight has been read, and the adapter to begin with, if any."""

    folder: Path
    adapter: Path | None
    lora: LoRAConfig
    outline: Outline
    tokenizer: Tokenizer

    def sizes(self, config: TrainConfig) -> Sizes:
        """What the run will write."""
        return Sizes.of(
            (parameter for _, parameter in trainable(self.outline.model)), config.optim, self.tokenizer.files
        )


def _read_base(config: TrainConfig, world: World) -> _Base:
    folder = world.first_on_node(lambda: _downloaded(config))
    adapter = world.first_on_node(partial(find_adapter, config.adapter)) if config.adapter else None
    lora = lora_config(config, adapter)
    dtype = compute_dtype(config.dtype, world.device)
    with refused_by_all(groups_of(world.mesh), world.device):  # what cannot be read, before the data is
        outline = Outline.of(folder, lora, dtype, random_init=config.random_init, model_code=config.model_code)
        objective_of(config, outline.model)
    return _Base(folder, adapter, lora, outline, Tokenizer.from_folder(folder, template_options(config)))


def _load_model(config: TrainConfig, world: World, base: _Base) -> tuple[CausalLM, str]:
    """The model where it trains, and why its layout is what it is, where that was left open."""
    layout, why = _layout(config, world, frozen_bytes(base.outline.model))
    mesh = mesh_of(world, config.dp_replicate)
    model = base.outline.filled(mesh, world.device, layout=layout, checkpointing=config.checkpointing, seed=config.seed)
    if config.packing:
        model.refuse_packing_that_leaks()
    if base.adapter:
        load_adapter(model, base.adapter)
    return model, why


def _setup(
    config: TrainConfig,
    world: World,
    base: _Base,
    data: RunData,
    model: CausalLM,
    progress: Progress,
    total_steps: int,
) -> TrainingSetup:
    return TrainingSetup(
        model=model,
        tokenizer=base.tokenizer,
        lora=base.lora,
        optimizer=_optimizer(config, model),
        loader=data.loader,
        eval_loaders=eval_loaders(config, world, base.tokenizer, data.evaluation),
        prompts=data.prompts,
        samples=data.samples,
        late_notes=partial(data.late_notes, config),
        total_steps=total_steps,
        base_model=str(base.folder.resolve()) if Path(config.model).is_dir() else config.model,
        progress=progress,
        stopping=Stopping(world, collective_timeout(config)),
    )


def _keep_initial(
    config: TrainConfig, base: _Base, progress: Progress, first: dict[str, Tensor] | None, resume_from: Path | None
) -> str:
    """Have the output folder hold what the adapter began with, if that was a change; returns the file's hash."""
    output = Path(config.output_dir)
    if first:
        return write_initial(output, first)
    before = resume_from / ADAPTER if resume_from else base.adapter
    initial = progress.initial if resume_from else (initial_of(before) if before else "")
    if before and initial:
        copy_initial(before, output, initial)
    return initial


@heartbeat.working_outside("downloading, or looking for, model and datasets")
def _downloaded(config: TrainConfig) -> Path:
    """The model's folder. It and the datasets are on this node's disk then, whatever is on the Hub of them."""
    split, streaming = config.dataset_split, config.streaming
    refuse_overlaps([(dataset, files_of(dataset, split, streaming=streaming)) for dataset in config.datasets])
    for source in config.eval_sets.values():
        files_of(source, eval_dataset_split(config))
    for prompts in (config.exact_match_dataset, config.sample_prompts):
        if prompts is not None and not prompts.endswith(TEXT_FILE):
            files_of(prompts, "train")
    return find_checkpoint(config.model, config.revision, weights=not config.random_init)


def _layout(config: TrainConfig, world: World, frozen: int) -> tuple[Layout, str]:
    """Where the frozen weights, so many bytes of them, go, and, if that was left open, why."""
    return choose_layout(config, world.size, frozen, lambda: least_memory(world))


def _facts(base: _Base, data: RunData, setup: TrainingSetup, plan: Plan | None) -> RunFacts:
    return RunFacts(
        folder=base.folder,
        model_type=str(read_json(base.folder / "config.json").get("model_type", "")),
        parameters=parameter_count(setup.model),
        trained=sum(parameter.numel() for _, parameter in trainable(setup.model)),
        data=data,
        progress=setup.progress,
        total_steps=setup.total_steps,
        plan=plan,
    )


def _base_notes(config: TrainConfig, base: _Base, progress: Progress) -> list[str]:
    assert base.adapter is not None
    own = BaseIdentity.from_json(progress.base)
    note = base_note(base.adapter, config.model, base.folder, allow_other=config.allow_other_base, base=own)
    return [line for line in (note, _template_note(base)) if line]


def _template_note(base: _Base) -> str | None:
    """A line where rows are written otherwise than those of the adapter's earlier training."""
    assert base.adapter is not None
    if not any((base.adapter / name).is_file() for name in ("tokenizer.json", TEMPLATE, OPTIONS_FILE)):
        return None
    difference = base.tokenizer.template_difference(trained_tokenizer(base.folder, base.adapter))
    return difference and f"note: {difference}"


def _optimizer(config: TrainConfig, model: CausalLM) -> ScaledOptimizer:
    kinds: dict[str, Callable[..., ScaledOptimizer]] = {
        "adamw": AdamW,
        "adamw8bit": partial(PagedAdamW8bit, page_budget="none"),
        "paged_adamw8bit": PagedAdamW8bit,
    }
    return kinds[config.optim](
        [parameter for _, parameter in trainable(model)],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _total_steps(config: TrainConfig, loader: StepLoader | WindowLoader) -> int:
    """``--max-steps``, or the steps of ``--num-train-epochs``, the last of them in part."""
    if config.max_steps > 0:
        return config.max_steps
    assert isinstance(loader, StepLoader), "streams go with --max-steps"
    whole, part = divmod(config.num_train_epochs, 1)
    steps = sum(loader.steps_in_epoch(epoch) for epoch in range(int(whole)))
    # 0.1 epochs of 10 steps are 1 step, whatever the last bits of 1.1 - 1 are
    return max(1, steps + math.ceil(round(part * loader.steps_in_epoch(int(whole)), 6)))


def _summary(
    config: TrainConfig, world: World, setup: TrainingSetup, data: RunData, resume_from: Path | None
) -> list[str]:
    trained = sum(parameter.numel() for _, parameter in trainable(setup.model))
    lines = [
        f"model {config.model}: {parameter_count(setup.model):,} parameters in 4 bits, {trained:,} trained in "
        f"adapters (r = {setup.lora.r}, alpha = {setup.lora.lora_alpha:g}), on {world.size} x {world.device.type}",
        *data.lines(config),
    ]
    if note := builtin_note(config):
        lines.append(note)
    limit = setup.model.config.max_position_embeddings
    if config.max_length > limit:
        lines.append(f"note: --max-length {config.max_length} is beyond the {limit} positions the model was made for")
    if resume_from:
        lines.append(f"resumed from {resume_from} at step {setup.progress.step}")
    return lines
