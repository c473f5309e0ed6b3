"""What a training run is made of, prepared in the order in which mistakes are cheapest to find: data, then model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qsharded.checkpoint.adapter import load_adapter, trainable
from qsharded.checkpoint.base_identity import BaseIdentity
from qsharded.checkpoint.load import Outline, parameter_count
from qsharded.checkpoint.resume import Progress, load_checkpoint
from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.base_model import base_note, find_adapter, lora_config
from qsharded.cli.command import compute_dtype
from qsharded.config import TrainConfig
from qsharded.data import Dataset, Mixture, Prompt, StepLoader, Tokenizer, load_examples, load_prompts
from qsharded.data.mixture import refuse_overlaps
from qsharded.data.omissions import omission_notes
from qsharded.data.sources import find_files
from qsharded.distributed.agreement import found_by_main, groups_of, refused_by_all
from qsharded.distributed.fsdp import World, mesh_of
from qsharded.distributed.layout import (
    Layout,
    choose_layout,
    free_host_memory,
    frozen_bytes,
    least_free_memory,
    least_memory,
)
from qsharded.lora.config import LoRAConfig
from qsharded.models import CausalLM
from qsharded.optim import AdamW, PagedAdamW8bit, ScaledOptimizer
from qsharded.plan.checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Planner
from qsharded.training.disk_room import Sizes
from qsharded.training.finished import end_if_finished
from qsharded.training.resuming import Made, Resumed, kept_accumulation
from qsharded.training.run_folder import check_output_dir, check_room, claim_output_dir, find_resumed
from qsharded.training.stopping import Stopping
from qsharded.utils.checkpointing_modes import Checkpointing


@dataclass
class TrainingSetup:
    """Everything that the training loop works with."""

    model: CausalLM
    tokenizer: Tokenizer
    lora: LoRAConfig
    optimizer: ScaledOptimizer
    loader: StepLoader
    eval_loader: StepLoader | None
    prompts: Sequence[Prompt]
    total_steps: int
    base_model: str
    progress: Progress
    stopping: Stopping
    summary: list[str] = field(default_factory=list)

    def epochs_done(self) -> float:
        """Passes over the data so far, with their fraction."""
        epoch, loader = self.progress.epoch, self.loader
        return epoch + self.progress.row / (loader.steps_in_epoch(epoch) * loader.rows_per_step)


def prepare(config: TrainConfig, world: World) -> TrainingSetup:
    """Read the data, build the model, find where the run stands; what an earlier run left is only then replaced.

    Raises:
        ValueError: a mistake of the user's, named.
        AlreadyFinished: there is nothing left to do.
    """
    resume_from = find_resumed(config, world)
    check_output_dir(config, world, resume_from)
    resumed = Resumed.read(resume_from, world)
    folder = world.first_on_node(lambda: _downloaded(config))
    adapter = find_adapter(config.adapter) if config.adapter else None
    lora = lora_config(config, adapter)
    dtype = compute_dtype(config.dtype, world.device)
    with refused_by_all(groups_of(world.mesh), world.device):  # what cannot be read, before the data is
        outline = Outline.of(folder, lora, dtype, random_init=config.random_init)
    tokenizer = Tokenizer.from_folder(folder)
    sizes = Sizes.of((parameter for _, parameter in trainable(outline.model)), config.optim, tokenizer.files)
    check_room(config, world, resume_from, sizes)
    train_data, eval_data = _datasets(config, tokenizer)
    prompts = _prompts(config, tokenizer)
    _check_vocabulary(outline.model.config.vocab_size, train_data, eval_data, prompts)
    accumulation, kept = kept_accumulation(config, world.size, resumed)
    batches = replace(config, gradient_accumulation_steps=accumulation)
    loader = _loader(batches, world, tokenizer, train_data, config.per_device_train_batch_size, shuffle=True)
    world.barrier()  # ranks that are still reading rows must not be waited for in a collective of the loading
    made = Made(config, loader.rows_per_step, train_data, tokenizer, folder)
    progress, notes = made.progress(world, resumed)
    total_steps = _total_steps(config, loader)
    end_if_finished(config, world, resume_from, progress, total_steps)
    if adapter and not resumed:
        notes += found_by_main(world, lambda: _base_notes(config, adapter, folder, progress))
    layout, why = _layout(config, world, frozen_bytes(outline.model))
    checkpointing, chosen = _checkpointing(config, world, outline, lora)
    model = outline.filled(
        mesh_of(world, config.dp_replicate),
        world.device,
        layout=layout,
        checkpointing=checkpointing,
        seed=config.seed,
    )
    if adapter:
        load_adapter(model, adapter)
    optimizer = _optimizer(config, model)
    setup = TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        lora=lora,
        optimizer=optimizer,
        loader=loader,
        eval_loader=_eval_loader(config, world, tokenizer, eval_data),
        prompts=prompts,
        total_steps=total_steps,
        base_model=str(folder.resolve()) if Path(config.model).is_dir() else config.model,
        progress=progress,
        stopping=Stopping(world),
    )
    if resume_from:
        load_checkpoint(resume_from, model, lora, optimizer)
    claim_output_dir(config, world, resume_from)
    setup.summary = _summary(config, world, setup, train_data, eval_data, resume_from)
    setup.summary += [line for line in (why, chosen, kept, *notes) if line]
    return setup


def _downloaded(config: TrainConfig) -> Path:
    """The model's folder. It and the datasets are on this node's disk then, whatever is on the Hub of them."""
    refuse_overlaps([(dataset, find_files(dataset, config.dataset_split)) for dataset in config.datasets])
    sources = [
        (config.eval_dataset, _eval_dataset_split(config)),
        (config.exact_match_dataset, "train"),
    ]
    for source, split in sources:
        if source is not None:
            find_files(source, split)
    return find_checkpoint(config.model, config.revision, weights=not config.random_init)


def _eval_dataset_split(config: TrainConfig) -> str:
    return config.eval_dataset_split or config.dataset_split


def _layout(config: TrainConfig, world: World, frozen: int) -> tuple[Layout, str]:
    """Where the frozen weights, so many bytes of them, go, and, if that was left open, why."""
    return choose_layout(config, world.size, frozen, lambda: least_memory(world))


def _checkpointing(config: TrainConfig, world: World, outline: Outline, lora: LoRAConfig) -> tuple[Checkpointing, str]:
    """How activations are checkpointed, and if that was left open, why so."""
    if config.activation_checkpointing != "auto":
        return config.checkpointing, ""
    planner = Planner(outline.model.config, lora, outline.dtype, least_free_memory(world), outline.packed)
    host = free_host_memory() if world.device.type == "cuda" else None
    chosen, line = choose_checkpointing(planner, config, world.size, host)
    return chosen.checkpointing, line


def _base_notes(config: TrainConfig, adapter: Path, folder: Path, progress: Progress) -> list[str]:
    base = BaseIdentity.from_json(progress.base)
    note = base_note(adapter, config.model, folder, allow_other=config.allow_other_base, base=base)
    return [note] if note else []


def _check_vocabulary(
    vocab_size: int, train_data: Mixture, eval_data: Dataset | None, prompts: Sequence[Prompt]
) -> None:
    """An id beyond the embedding would stop a GPU with no word of the row at fault."""
    examples = train_data.examples + (eval_data.examples if eval_data else [])
    largest = max(max(int(example.ids.max()) for example in examples), *(max(prompt.ids) for prompt in prompts), 0)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocab_size is {vocab_size}: the tokenizer's files and "
            "config.json are of different models, or tokens were added without resizing the embedding"
        )


def _datasets(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Mixture, Dataset | None]:
    def load(source: str, split: str) -> Dataset:
        return load_examples(
            source,
            tokenizer,
            format=config.dataset_format,
            max_length=config.max_length,
            overlong=config.overlong,
            train_on=config.train_on,
            one_example_per_answer=config.one_example_per_answer,
            split=split,
        )

    parts = {dataset: load(dataset, config.dataset_split) for dataset in config.datasets}
    train_data = Mixture(parts, config.dataset_weights or None)
    if config.eval_dataset:
        return train_data, load(config.eval_dataset, _eval_dataset_split(config))
    if config.eval_split:
        return train_data.split(config.eval_split, config.seed)
    return train_data, None


def _prompts(config: TrainConfig, tokenizer: Tokenizer) -> Sequence[Prompt]:
    if config.exact_match_dataset is None:
        return []
    return load_prompts(config.exact_match_dataset, tokenizer, format=config.dataset_format)


def _loader(
    config: TrainConfig, world: World, tokenizer: Tokenizer, data: Dataset | Mixture, batch_size: int, *, shuffle: bool
) -> StepLoader:
    return StepLoader(
        data.examples,
        max_length=config.max_length,
        packing=config.packing,
        batch_size=batch_size,
        accumulation=config.gradient_accumulation_steps if shuffle else 1,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        shuffle=shuffle,
        draw=data.draw(config.seed) if isinstance(data, Mixture) else None,
    )


def _eval_loader(config: TrainConfig, world: World, tokenizer: Tokenizer, data: Dataset | None) -> StepLoader | None:
    if data is None:
        return None
    return _loader(config, world, tokenizer, data, config.per_device_eval_batch_size, shuffle=False)


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


def _total_steps(config: TrainConfig, loader: StepLoader) -> int:
    """``--max-steps``, or the steps of ``--num-train-epochs``, the last of them in part."""
    if config.max_steps > 0:
        return config.max_steps
    whole, part = divmod(config.num_train_epochs, 1)
    steps = sum(loader.steps_in_epoch(epoch) for epoch in range(int(whole)))
    # 0.1 epochs of 10 steps are 1 step, whatever the last bits of 1.1 - 1 are
    return max(1, steps + math.ceil(round(part * loader.steps_in_epoch(int(whole)), 6)))


def _summary(
    config: TrainConfig,
    world: World,
    setup: TrainingSetup,
    train_data: Mixture,
    eval_data: Dataset | None,
    resume_from: Path | None,
) -> list[str]:
    trained = sum(parameter.numel() for _, parameter in trainable(setup.model))
    lines = [
        f"model {config.model}: {parameter_count(setup.model):,} parameters in 4 bits, {trained:,} trained in "
        f"adapters (r = {setup.lora.r}, alpha = {setup.lora.lora_alpha:g}), on {world.size} x {world.device.type}",
        *_data_lines(train_data, config),
    ]
    if eval_data is not None:
        lines.append(f"evaluation: {_counts(eval_data, config.max_length)}")
        lines += omission_notes(eval_data, config.one_example_per_answer)
    limit = setup.model.config.max_position_embeddings
    if config.max_length > limit:
        lines.append(f"note: --max-length {config.max_length} is beyond the {limit} positions the model was made for")
    if resume_from:
        lines.append(f"resumed from {resume_from} at step {setup.progress.step}")
    return lines


def _data_lines(data: Mixture, config: TrainConfig) -> list[str]:
    """A line for each dataset; of several, with what an epoch takes of it; and what the chat template leaves out."""
    taken, lines = data.rows_an_epoch(), []
    for (name, part), rows in zip(data.parts.items(), taken, strict=True):
        share = f"; {rows:,} an epoch ({rows / sum(taken):.1%} of the mixture)" if len(taken) > 1 else ""
        lines += [f"data {name}: {_counts(part, config.max_length)}{share}"]
        lines += omission_notes(part, config.one_example_per_answer)
    return lines


def _counts(data: Dataset, max_length: int) -> str:
    others = {"longer ones dropped": data.dropped, "truncated": data.truncated, "blank ones left out": data.empty}
    listed = "".join(f", {count:,} {label}" for label, count in others.items() if count)
    return f"{len(data.examples):,} rows of up to {max_length} tokens{listed}"
