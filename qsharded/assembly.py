"""What a training run is made of, prepared in the order in which mistakes are cheapest to find: data, then model."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.optim import AdamW, Optimizer

from qsharded.checkpoint.adapter import load_adapter, read_lora_config, trainable
from qsharded.checkpoint.load import load_model, parameter_count
from qsharded.checkpoint.source import find_checkpoint
from qsharded.checkpoint.training import Progress, complete_checkpoints, load_checkpoint
from qsharded.commands import DTYPES, compute_dtype
from qsharded.config import TrainConfig, write_toml
from qsharded.data import Dataset, Prompt, StepLoader, Tokenizer, load_examples, load_prompts, split_examples
from qsharded.models import CausalLM
from qsharded.nn import LoRAConfig
from qsharded.parallel import World


@dataclass
class Parts:
    """Everything that the training loop works with."""

    model: CausalLM
    tokenizer: Tokenizer
    lora: LoRAConfig
    optimizer: Optimizer
    loader: StepLoader
    eval_loader: StepLoader | None
    prompts: Sequence[Prompt]
    total_steps: int
    progress: Progress
    summary: list[str] = field(default_factory=list)

    def epochs_done(self) -> float:
        """Passes over the data so far, with their fraction."""
        epoch, loader = self.progress.epoch, self.loader
        return epoch + self.progress.row / (loader.steps_in_epoch(epoch) * loader.rows_per_step)


def prepare(config: TrainConfig, world: World) -> Parts:
    """Read the data, build the model, find where the run stands.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    resume_from = _resume_folder(config)
    _claim_output_dir(config, world, resuming=resume_from is not None)
    folder = find_checkpoint(config.model, config.revision)
    tokenizer = Tokenizer.from_folder(folder)
    train_data, eval_data = _datasets(config, tokenizer)
    prompts = _prompts(config, tokenizer)
    loader = _loader(config, world, tokenizer, train_data, config.per_device_train_batch_size, shuffle=True)
    lora = _lora_config(config)
    model = load_model(
        folder,
        mesh=world.mesh,
        lora=lora,
        dtype=compute_dtype(config.dtype, world.device),
        device=world.device,
        gradient_checkpointing=config.gradient_checkpointing,
        random_init=config.random_init,
        seed=config.seed,
    )
    if config.adapter:
        load_adapter(model, Path(config.adapter))
    optimizer = _optimizer(config, model)
    parts = Parts(
        model=model,
        tokenizer=tokenizer,
        lora=lora,
        optimizer=optimizer,
        loader=loader,
        eval_loader=_eval_loader(config, world, tokenizer, eval_data),
        prompts=prompts,
        total_steps=_total_steps(config, loader),
        progress=load_checkpoint(resume_from, model, optimizer) if resume_from else Progress(),
    )
    parts.summary = _summary(config, world, parts, train_data, resume_from)
    return parts


def _resume_folder(config: TrainConfig) -> Path | None:
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "auto":
        return next(reversed(complete_checkpoints(Path(config.output_dir))), None)
    folder = Path(config.resume_from_checkpoint)
    if not folder.is_dir():
        raise ValueError(f"--resume-from-checkpoint: {folder} is no folder")
    return folder


def _claim_output_dir(config: TrainConfig, world: World, resuming: bool) -> None:
    """Make the output folder and write config.toml; what an earlier run left is only replaced when told."""
    folder = Path(config.output_dir)
    results = [path for path in (folder / "adapter", *(folder / "checkpoints").glob("step-*")) if path.exists()]
    traces = [path for path in (folder / "metrics.jsonl", folder / "config.toml") if path.exists()]
    world.barrier()  # every rank has looked before the main one writes
    # "auto" may start afresh over a run that was stopped before it had anything to lose
    kept = results if config.resume_from_checkpoint == "auto" else results + traces
    if kept and not resuming and not config.overwrite_output_dir:
        raise ValueError(
            f"{folder} holds an earlier run ({kept[0].name}); choose another --output-dir, continue it with "
            "--resume-from-checkpoint auto, or replace it with --overwrite-output-dir"
        )
    if world.is_main:
        if not resuming:
            _delete(results + traces)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(write_toml(config), encoding="utf-8")


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _datasets(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    def load(source: str, split: str) -> Dataset:
        return load_examples(
            source,
            tokenizer,
            format=config.dataset_format,
            max_length=config.max_length,
            overlong=config.overlong,
            train_on=config.train_on,
            split=split,
        )

    train_data = load(config.dataset, config.dataset_split)
    if config.eval_dataset:
        return train_data, load(config.eval_dataset, config.eval_dataset_split or config.dataset_split)
    if config.eval_split:
        return split_examples(train_data, config.eval_split, config.seed)
    return train_data, None


def _prompts(config: TrainConfig, tokenizer: Tokenizer) -> Sequence[Prompt]:
    if config.exact_match_dataset is None:
        return []
    return load_prompts(config.exact_match_dataset, tokenizer, format=config.dataset_format)


def _loader(
    config: TrainConfig, world: World, tokenizer: Tokenizer, data: Dataset, batch_size: int, *, shuffle: bool
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
    )


def _eval_loader(config: TrainConfig, world: World, tokenizer: Tokenizer, data: Dataset | None) -> StepLoader | None:
    if data is None:
        return None
    return _loader(config, world, tokenizer, data, config.per_device_eval_batch_size, shuffle=False)


def _lora_config(config: TrainConfig) -> LoRAConfig:
    dtype = DTYPES[config.lora_dtype]
    if config.adapter:
        return read_lora_config(Path(config.adapter), dtype)
    return LoRAConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
        rank_pattern=config.lora_rank_pattern,
        alpha_pattern=config.lora_alpha_pattern,
        modules_to_save=config.lora_modules_to_save,
        dtype=dtype,
    )


def _optimizer(config: TrainConfig, model: CausalLM) -> Optimizer:
    return AdamW(
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
    return max(1, steps + math.ceil(part * loader.steps_in_epoch(int(whole))))


def _summary(config: TrainConfig, world: World, parts: Parts, data: Dataset, resume_from: Path | None) -> list[str]:
    trained = sum(parameter.numel() for _, parameter in trainable(parts.model))
    counts = {"longer ones dropped": data.dropped, "truncated": data.truncated, "blank ones left out": data.empty}
    others = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    lines = [
        f"model {config.model}: {parameter_count(parts.model):,} parameters in NF4, {trained:,} trained in "
        f"adapters, on {world.size} x {world.device.type}",
        f"data {config.dataset}: {len(data.examples):,} rows of up to {config.max_length} tokens{others}",
    ]
    if resume_from:
        lines.append(f"resumed from {resume_from} at step {parts.progress.step}")
    return lines
