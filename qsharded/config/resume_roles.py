"""What each option of training means to a run that goes on from a checkpoint. A new option gets its place here."""

from typing import Literal

Role = Literal["base", "rows", "fixed", "step", "adapter", "told", "free"]

_OPTIONS: dict[Role, tuple[str, ...]] = {
    # Which base weights: a fingerprint tells, wherever they lie.
    "base": ("model", "revision", "random_init", "calibrate", "original_model"),
    # Which rows with which loss masks: a fingerprint tells, and these may be why they are others.
    "rows": (
        "dataset", "dataset_split", "dataset_format", "dataset_columns", "streaming", "train_on",
        "one_example_per_answer", "train_on_turn_ends", "train_on_empty_answers", "bad_rows", "chat_template",
        "chat_template_kwargs", "template_date", "overlong", "eval_split",
    ),
    # Which rows an epoch draws, their order, and what a row of a batch holds.
    "fixed": ("dataset_weights", "seed", "max_length", "packing", "lora_init"),
    # Rows of a step, together with the number of ranks; that product is fixed.
    "step": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    # The adapter's own configuration, which the checkpoint holds; it is fixed but for dropout.
    "adapter": (
        "lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
        "lora_rank_pattern", "lora_alpha_pattern", "use_rslora",
    ),
    # These change the mathematics of the steps to come: on purpose, so they are taken and said.
    "told": (
        "learning_rate", "router_aux_loss_coef", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
        "num_train_epochs", "max_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "optim", "lora_dropout", "lora_dtype", "dtype",
    ),
    # Where things lie, how fast and in whose memory it is computed, what is shown and saved.
    "free": (
        "data_cache", "adapter", "allow_other_base", "model_code", "ignore_config_key", "activation_checkpointing",
        "checkpointed_layers", "sharding", "reshard_after_forward", "dp_replicate", "cpu_offload", "max_skipped_steps",
        "deterministic",
        "output_dir", "overwrite_output_dir", "logging_steps", "show_rows", "show_characters", "save_steps",
        "save_total_limit", "resume_from_checkpoint", "exit_code_when_stopped", "eval_dataset", "eval_dataset_split",
        "eval_steps", "per_device_eval_batch_size", "exact_match_dataset", "save_best", "early_stopping_patience",
        "early_stopping_threshold", "sample_prompts", "sample_steps", "sample_max_new_tokens", "report_to",
        "report_png", "dry_run", "gpus", "gpu_memory_gib", "profile", "hang_timeout", "self_check", "ranks", "gpu",
        "host_memory_gib", "sweep", "push_to_hub", "hub_private",
    ),
}  # fmt: skip
PATHS = ("dataset", "dataset_split")  # of the rows: where they are, which alone makes them no others


def options_of(*roles: Role) -> tuple[str, ...]:
    """The fields of ``TrainConfig`` in these roles."""
    return tuple(name for role in roles for name in _OPTIONS[role])


def all_options() -> list[str]:
    """Every field that has a role, once for each that it has."""
    return [name for names in _OPTIONS.values() for name in names]
