"""What other trainers call our options, for the suggestion behind an unknown key."""

from collections.abc import Sequence

NAMES = {
    "dtype": "bf16 fp16 fp32 torch-dtype precision compute-dtype bnb-4bit-compute-dtype",
    "chat-template": "template prompt-template",
    "report-to": "wandb wandb-project use-wandb tensorboard mlflow",
    "push-to-hub": "hub-model-id hub-repo-id",
    "eval-steps": "eval-strategy evaluation-strategy eval-every eval-interval",
    "model": "base-model model-name model-name-or-path model-id pretrained-model-name-or-path",
    "adapter": "adapter-name-or-path adapter-path lora-path lora-model-dir",
    "dataset": "data data-path datasets dataset-name dataset-path train-file train-dataset",
    "dataset-split": "split",
    "max-length": "max-seq-length max-seq-len model-max-length seq-length seq-len sequence-len cutoff-len block-size",
    "packing": "sample-packing pack",
    "per-device-train-batch-size": "batch-size micro-batch-size train-batch-size per-device-batch-size bs",
    "gradient-accumulation-steps": "gradient-accumulation grad-accum accumulation-steps accumulate-grad-batches",
    "activation-checkpointing": "gradient-checkpointing enable-activation-checkpointing",
    "ranks": "nproc nproc-per-node num-gpus n-gpus num-processes world-size devices",
    "cpu-offload": "fsdp-cpu-offload offload",
    "lora-r": "r rank lora-rank lora-dim",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "lora-target-modules": "target-modules lora-target lora-targets lora-target-linear",
    "lora-modules-to-save": "modules-to-save additional-target",
    "use-rslora": "rslora peft-use-rslora",
    "learning-rate": "lr",
    "lr-scheduler-type": "lr-scheduler scheduler",
    "warmup-steps": "warmup num-warmup-steps",
    "num-train-epochs": "epochs epoch num-epochs n-epochs",
    "max-steps": "steps num-steps max-iters iterations",
    "max-grad-norm": "grad-clip gradient-clip gradient-clip-val clip-grad-norm",
    "weight-decay": "wd",
    "optim": "optimizer",
    "output-dir": "output out out-dir save-dir",
    "output": "out output-dir save-dir output-path export-dir",
    "overwrite-output-dir": "overwrite",
    "logging-steps": "log-steps log-every log-interval",
    "save-steps": "save-strategy save-every save-interval",
    "resume-from-checkpoint": "resume resume-from",
    "eval-dataset": "val-dataset validation-dataset eval-file validation-file",
    "eval-split": "val-split val-set-size test-size val-size",
    "per-device-eval-batch-size": "eval-batch-size",
    "save-best": "metric-for-best-model load-best-model-at-end early-stopping-metric",
    "early-stopping-patience": "early-stopping patience early-stop-patience",
    "max-new-tokens": "max-tokens n-predict",
    "temperature": "temp",
}

# What they have to be told, and this one does by itself.
_BY_ITSELF = {
    "frozen weights are always in 4 bits": "load-in-4bit use-4bit qlora quantization quantization-bit",
    "FSDP2 shards whenever there are several ranks": "deepspeed fsdp fsdp-config fsdp-transformer-layer-cls-to-wrap",
    "the attention kernel is chosen": "flash-attn flash-attention use-flash-attention-2 attn-implementation",
    "no code of a checkpoint is run": "trust-remote-code",
    "training is all that this command does": "do-train stage finetuning-type",
}


def done_by_itself(key: str) -> str:
    """Why an option of other trainers is none here; "" where ``key`` is none of those."""
    return next((why for why, theirs in _BY_ITSELF.items() if key in theirs.split()), "")


def other_names(key: str, keys: Sequence[str]) -> list[str]:
    """Those of our ``keys`` that other trainers call ``key``."""
    return [ours for ours, theirs in NAMES.items() if ours in keys and key in theirs.split()]
