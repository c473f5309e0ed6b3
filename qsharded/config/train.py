"""The options of `python -m qsharded.train`."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from qsharded.config.bad_rows import bad_rows_option, skipped_bad_rows
from qsharded.config.evaluated import EXACT_MATCH, eval_sets, measures
from qsharded.config.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    DATE,
    FRACTION,
    POSITIVE,
    Check,
    check_values,
    hub_private,
    ignored_config_keys,
    option,
    push_to_hub,
)
from qsharded.utils.cards import CardName
from qsharded.utils.checkpointing_modes import Checkpointing, ModeOrAuto

TRACKERS = ("tensorboard", "wandb", "mlflow")

_model = partial(option, group="Model")
_data = partial(option, group="Data")
_lora = partial(option, group="LoRA adapter")
_batch = partial(option, group="Length and batches")
_memory = partial(option, group="Memory and sharding")
_optimizer = partial(option, group="Optimizer")
_output = partial(option, group="Output and logging")
_eval = partial(option, group="Evaluation")
_plan = partial(option, group="Plan")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a LoRA adapter on a model whose frozen weights are kept in 4 bits (NF4) and sharded over the ranks.

    `qsharded train` starts a rank for each GPU of this machine; under torchrun or srun it starts none. With no --model
    it trains the built-in model on the built-in dataset, with settings that suit them; flags beat those too.

    What the chat template leaves out of rows is counted in the run's summary (reasoning, definitions of tools, system
    messages) or refused, naming the row (tool calls and their answers). Where an answer's text cannot be told from the
    rest, one of these helps: --one-example-per-answer; "weight": 0 on that message, which keeps it out of the loss; or
    the row as "prompt" and "completion", two lists of messages of which the second alone is trained on.
    """

    prog: ClassVar[str] = "qsharded.train"
    example: ClassVar[str] = "qsharded train --model meta-llama/Llama-3.1-8B-Instruct --dataset rows.jsonl"
    common: ClassVar[tuple[str, ...]] = (
        "model", "adapter", "dataset", "max_length", "packing", "per_device_train_batch_size",
        "gradient_accumulation_steps", "ranks", "cpu_offload", "lora_r", "lora_alpha", "lora_target_modules",
        "learning_rate", "num_train_epochs", "max_steps", "output_dir", "save_steps", "resume_from_checkpoint",
        "eval_split", "dry_run",
    )  # fmt: skip

    model: str = _model("Hugging Face checkpoint: a folder, or a Hub id.", metavar="PATH|ID", unset="the built-in one")
    revision: str | None = _model("Branch, tag or commit of a Hub id.", None, unset="the Hub's main branch")
    dtype: Literal["auto", "bfloat16", "float32"] = _model(
        "Type of the activations and of the weights that stay out of NF4; auto is bfloat16 on GPUs, float32 on CPUs.",
        "auto",
    )
    model_code: Literal["auto", "native", "transformers"] = _model(
        "Whose code computes the model: native has the families of docs/models.md; transformers is that library, for "
        "any of its causal language models; auto takes native where it has the family.",
        "auto",
    )
    ignore_config_key: tuple[str, ...] = ignored_config_keys("Model")
    random_init: bool = _model("Random weights in the shape that --model's config.json gives, for benchmarks.", False)
    calibrate: int = _model(
        "Training rows of --max-length tokens to calibrate the base on before the run: it is packed once, closer to "
        "the original in as many bytes (docs/calibration.md), into a folder beside --data-cache. 0 rounds to nearest.",
        0,
        unit="rows",
        check=AT_LEAST_0,
    )
    original_model: str | None = _model(
        "The checkpoint in 16 bits that a packed --model was made from, for --lora-init residual.",
        None,
        metavar="PATH|ID",
        unset="--model itself",
    )
    adapter: str | None = _model(
        "PEFT adapter to go on training, a folder or a Hub id; its own configuration replaces the --lora options.",
        None,
        metavar="PATH|ID",
        unset="a new adapter",
    )
    allow_other_base: bool = _model(
        "Go on with an --adapter that records other base weights than those of --model.", False
    )

    dataset: str | tuple[str, ...] = _data(
        "Training rows: a .jsonl, .json or .parquet file, a folder of them, or a Hub dataset id; with `datasets` "
        "installed also .csv, .tsv, .arrow, compressed files, and configurations, as owner/name:configuration. "
        "Several, behind one flag or with a flag for each, are mixed: every row comes once an epoch, or as "
        "--dataset-weights says.",
        metavar="PATH|ID ...",
        unset="the built-in dataset, if the model is",
    )
    dataset_weights: list[float] = _data(
        "Shares of the datasets in an epoch's rows, in their order, as 0.7 0.3 or 7 3. An epoch has as many rows as it "
        "can without one twice: one dataset is taken whole, and of the others the next epochs take other rows.",
        [],
        unset="each row once an epoch",
    )
    dataset_format: Literal["auto", "messages", "conversations", "alpaca", "prompt-completion", "text"] = _data(
        "Format of the datasets; auto detects it.", "auto"
    )
    dataset_columns: dict[str, str] = _data(
        "Which column is which field, as prompt=question,completion=answer, where it is not told by its name; "
        "docs/data.md lists the fields and the names that are known.",
        {},
        metavar="FIELD=COLUMN ...",
    )
    dataset_split: str = _data("Split to read of a Hub dataset, or of a .json file that holds several.", "train")
    train_on: Literal["assistant", "all"] = _data(
        "Tokens that count in the loss: the assistant's, with the end of each turn, or all.", "assistant"
    )
    one_example_per_answer: bool = _data(
        "Make of a conversation one example for each answer, rendered as it would be at generation. It keeps reasoning "
        "that the chat template drops from earlier turns, and takes more tokens.",
        False,
    )
    train_on_turn_ends: bool = _data(
        "Train on the end of a turn too where the chat template's {% generation %} marks the content alone.", True
    )
    train_on_empty_answers: bool = _data(
        "Train on answers with no content and no tool calls, that is, on ending the turn at once; otherwise they are "
        "left out, and counted.",
        False,
    )
    bad_rows: str = bad_rows_option("Data")
    chat_template: str | None = _data(
        "File with the chat template to use in place of the model's; it is saved with the adapter.",
        None,
        metavar="FILE",
        unset="the model's",
    )
    chat_template_kwargs: dict[str, Any] = _data(
        "Variables for the chat template, as enable_thinking=false; they are saved with the adapter.",
        {},
        metavar="NAME=VALUE ...",
    )
    template_date: str | None = _data(
        "Date for chat templates that write today's, so that rows are the same tomorrow; it is saved with the adapter.",
        None,
        metavar="YYYY-MM-DD",
        check=DATE,
        unset="today",
    )

    streaming: bool = _data(
        "Read only the first rows of each training dataset, as many as --max-steps takes, and nothing else of it from "
        "the Hub, and tokenize them while the run trains: for datasets too large to read whole.",
        False,
    )
    data_cache: str | None = _data(
        "Folder of tokenized datasets, which all ranks of a node and later runs share; see docs/data-cache.md.",
        None,
        metavar="PATH",
        unset="~/.cache/qsharded/data, for datasets of 4 MiB and more",
    )

    max_length: int = _batch("Longest row.", 2048, unit="tokens", check=AT_LEAST_1)
    overlong: Literal["drop", "truncate"] = _batch("What happens to longer rows; they are counted.", "drop")
    packing: bool = _batch("Fill each row of a batch with several examples, which do not see each other.", False)
    per_device_train_batch_size: int = _batch("Rows in a micro-batch of one rank.", 4, unit="rows", check=AT_LEAST_1)
    gradient_accumulation_steps: int = _batch(
        "Micro-batches of a rank in an optimizer step.", 4, unit="micro-batches", check=AT_LEAST_1
    )
    ranks: int | None = _memory(
        "Processes that `qsharded train` starts on this machine; 1 starts none. Those of torchrun or srun count where "
        "they have started this one.",
        None,
        unit="ranks",
        check=AT_LEAST_1,
        unset="one for each GPU, or one",
    )
    activation_checkpointing: ModeOrAuto = _memory(
        "What the backward pass computes again. none: nothing; full keeps each layer's input alone: a third more work "
        "for a fraction of the memory; offloaded is full with the inputs in host memory; selective keeps what "
        "attention takes and puts out, and computes the MLP again. auto is the fastest that the plan says fits the "
        "GPU: as many layers as it has room for keep all.",
        "auto",
    )
    checkpointed_layers: int | None = _memory(
        "How many of the first layers --activation-checkpointing is for; the others keep all that backward reads.",
        None,
        unit="layers",
        check=AT_LEAST_1,
        unset="all layers",
    )
    sharding: Literal["full", "replicate", "auto"] = _memory(
        "Where the frozen weights are: cut over the ranks, whole on each (faster, for models that fit), or, with auto, "
        "whole if they take less than half of a rank's memory.",
        "full",
    )
    reshard_after_forward: Literal["always", "never", "auto"] = _memory(
        "Free a layer that was gathered for its forward and gather it again for its backward, or keep it, which is "
        "faster; with auto it is kept if the plan says that all layers fit beside the rest.",
        "auto",
    )
    dp_replicate: int = _memory(
        "Groups of ranks that hold the model once each, and cut it over their own ranks only (HSDP): for nodes with "
        "slow wires between them.",
        1,
        unit="groups",
        check=AT_LEAST_1,
    )
    cpu_offload: bool = _memory(
        "Keep the frozen weights in host memory; a layer's come while the one before it runs. Adapters and optimizer "
        "stay on the GPU.",
        False,
    )

    lora_r: int = _lora("Rank of the adapters.", 16, check=AT_LEAST_1)
    lora_alpha: float = _lora("Adapters are scaled by alpha / r.", 32.0, check=POSITIVE)
    lora_dropout: float = _lora("Dropout on the adapters' input.", 0.0, unit="fraction", check=FRACTION)
    lora_target_modules: str | list[str] = _lora(
        "Layers to adapt: all-linear (every linear layer but the head; of a mixture of experts attention, shared "
        "experts and experts, never the router), names such as q_proj,v_proj,embed_tokens, each of which must be "
        "there, or a regular expression that matches whole names.",
        "all-linear",
    )
    lora_target_parameters: list[str] = _lora(
        "Experts to adapt beside the layers that --lora-target-modules names: endings such as "
        "mlp.experts.gate_up_proj, as PEFT's target_parameters.",
        [],
    )
    lora_modules_to_save: list[str] = _lora(
        "Names of modules to train in full and save with the adapter; a mixture's router is mlp.gate.", []
    )
    lora_rank_pattern: dict[str, int] = _lora("Other ranks for the layers whose names match KEY.", {})
    lora_alpha_pattern: dict[str, float] = _lora("Other alphas for the layers whose names match KEY.", {})
    lora_dtype: Literal["float32", "bfloat16"] = _lora("Type of everything that is trained.", "float32")
    use_rslora: bool = _lora("Scale by alpha / sqrt(r) instead (rsLoRA).", False)
    lora_init: Literal["default", "residual"] = _lora(
        "residual begins adapters with what makes up best for the base's rounding on training rows, --calibrate of "
        "them or 32 (docs/calibration.md); default begins them at no change.",
        "default",
    )

    router_aux_loss_coef: float = _optimizer(
        "Of the loss that keeps a mixture's experts evenly busy, over all ranks (transformers' output_router_logits). "
        "It moves the adapters before a frozen router. 0: none.",
        0.0,
        check=AT_LEAST_0,
    )
    optim: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = _optimizer(
        "AdamW with moments in fp32, in 8 bits, or in 8 bits and in host memory where the GPU has no room for them.",
        "paged_adamw8bit",
    )
    learning_rate: float = _optimizer("Highest learning rate of AdamW.", 2e-4, check=POSITIVE)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _optimizer(
        "How the rate falls after the warm-up: to 0 along a cosine or a line, or not at all.", "cosine"
    )
    warmup_ratio: float = _optimizer("Part of the run in which the rate rises from 0.", 0.03, check=FRACTION)
    warmup_steps: int | None = _optimizer(
        "The same as a number of steps.", None, unit="steps", check=AT_LEAST_0, unset="--warmup-ratio decides"
    )
    num_train_epochs: float = _optimizer("Passes over the data.", 1.0, unit="epochs", check=POSITIVE)
    max_steps: int = _optimizer(
        "Optimizer steps to train for; -1 lets --num-train-epochs decide.",
        -1,
        unit="steps",
        check=Check("-1 or at least 1", lambda value: value == -1 or value >= 1),
    )
    weight_decay: float = _optimizer("Weight decay of AdamW.", 0.0, check=AT_LEAST_0)
    adam_beta1: float = _optimizer("Decay of the gradient's mean.", 0.9, check=FRACTION)
    adam_beta2: float = _optimizer("Decay of the squared gradient's mean.", 0.999, check=FRACTION)
    adam_epsilon: float = _optimizer("Added to the root of the squared gradient's mean.", 1e-8, check=POSITIVE)
    max_grad_norm: float = _optimizer("Gradients are clipped to this norm; 0 leaves them.", 1.0, check=AT_LEAST_0)
    max_skipped_steps: int = _optimizer(
        "Steps that may be skipped because their gradient is not finite, counted since the run was started or resumed; "
        "one more stops it at the next log line, and until then no checkpoint is saved.",
        0,
        unit="steps",
        check=AT_LEAST_0,
    )
    seed: int = _optimizer("Seed of the adapter's weights, the order of the data and dropout.", 42, check=AT_LEAST_0)
    deterministic: bool = _optimizer(
        "Use no GPU kernel whose sums change their order, so that a run, resumed or not, repeats to the last bit on "
        "the same GPUs and versions. Slower; on CPUs it is so anyway.",
        False,
    )

    output_dir: str = _output(
        "Folder to write adapter/, checkpoints/, report.html, metrics.jsonl and the like to; one run at a time.",
        "output",
        metavar="PATH",
    )
    overwrite_output_dir: bool = _output("Replace the earlier run that --output-dir holds.", False)
    logging_steps: int = _output("Steps from one log line to the next.", 10, unit="steps", check=AT_LEAST_1)
    report_to: list[str] = _output(
        "Where figures and samples go too: tensorboard (OUTPUT_DIR/tensorboard), wandb, mlflow, each with the package "
        "of that name, and as its own environment variables say. Their failures are warnings.",
        [],
        metavar="NAME ...",
    )
    report_png: bool = _output(
        "Draw the curves of report.html to report.png too, at the end, with the package matplotlib.", False
    )
    profile: str | None = _output(
        "Steps to record, as 12 or 12-14: OUTPUT_DIR/profile has a trace of each rank then, for chrome://tracing or "
        "ui.perfetto.dev.",
        None,
        metavar="STEP|FIRST-LAST",
        unset="none",
    )
    show_rows: int = _output(
        "Rows of each dataset to print at the start as the model sees them, with trained tokens marked; 0 prints none.",
        2,
        unit="rows",
        check=AT_LEAST_0,
    )
    show_characters: int = _output(
        "Longest of these rows that is printed whole; of longer ones the middle is left out. 0 prints all.",
        1000,
        unit="characters",
        check=AT_LEAST_0,
    )
    save_steps: int = _output(
        "Steps from one checkpoint to the next; the last step has one too. 0 writes none, save where a "
        "signal stops the run.",
        500,
        unit="steps",
        check=AT_LEAST_0,
    )
    save_total_limit: int | None = _output(
        "Checkpoints to keep, the newest undamaged ones. While training, the newest one that a later step has found a "
        "finite gradient at is kept too, so that a run can go back where it diverges.",
        None,
        unit="checkpoints",
        check=AT_LEAST_1,
        unset="all",
    )
    resume_from_checkpoint: str | None = _output(
        "Checkpoint folder to go on from, on any number of ranks; auto takes the newest undamaged one in --output-dir "
        "and starts afresh where there is none.",
        None,
        metavar="PATH|auto",
        unset="start afresh",
    )

    push_to_hub: str | None = push_to_hub("the adapter, at the end,", "Output and logging")
    hub_private: bool = hub_private("Output and logging")
    exit_code_when_stopped: int = _output(
        "Exit status of each rank of a run that a signal stopped, once it has saved what it needs to go on: for "
        "schedulers that take 0 for finished. torchrun's own is 1 for any other than 0.",
        0,
        check=Check("from 0 to 255", lambda value: 0 <= value <= 255),
    )
    self_check: Literal["auto", "always", "never"] = _output(
        "At the start, compare a layer, as it is sharded, fused and checkpointed, with its bytes unsharded, and end "
        "the run where they differ; it takes a second at most. auto: on CPUs, as on GPUs it is still to be proved.",
        "auto",
    )
    hang_timeout: float = _output(
        "Without progress of any rank for so long the run ends: every rank's stacks go to hang/ in --output-dir, and a "
        "line names the ranks that do not answer or are behind. Loading and evaluating are progress. 0 never ends it.",
        10,
        unit="minutes",
        check=AT_LEAST_0,
    )

    eval_dataset: str | tuple[str, ...] | None = _eval(
        "Rows to measure loss and perplexity on, from one of the sources that --dataset takes. Several sets are "
        "measured each by itself, as eval_NAME_loss; where no NAME is given it is the file's, without its ending.",
        None,
        metavar="[NAME=]PATH|ID ...",
        unset="none",
    )
    eval_dataset_split: str | None = _eval("Split to read of --eval-dataset.", None, unset="as --dataset-split")
    eval_split: float = _eval(
        "Part of --dataset, of each if there are several, to hold out for that instead.",
        0.0,
        unit="fraction",
        check=FRACTION,
    )
    eval_steps: int | None = _eval(
        "Steps from one evaluation to the next.",
        None,
        unit="steps",
        check=AT_LEAST_1,
        unset="only before and after training",
    )
    per_device_eval_batch_size: int = _eval("Rows in a batch of one rank.", 8, unit="rows", check=AT_LEAST_1)
    exact_match_dataset: str | None = _eval(
        "Rows whose last answer is generated greedily and compared with theirs, before and after training.",
        None,
        metavar="PATH|ID",
        unset="none",
    )
    save_best: str | None = _eval(
        "Measure, such as eval_loss, eval_NAME_loss or exact_match, by which the best adapter so far is kept, in best/ "
        "of --output-dir; it is taken at each --eval-steps and after training.",
        None,
        metavar="MEASURE",
        unset="none is kept",
    )
    early_stopping_patience: int | None = _eval(
        "Evaluations in a row that may be no better than the best one, by --save-best; the run ends at the last.",
        None,
        unit="evaluations",
        check=AT_LEAST_1,
        unset="never",
    )
    early_stopping_threshold: float = _eval(
        "By how much an evaluation must be better to count as better there.", 0.0, check=AT_LEAST_0
    )
    sample_prompts: str | None = _eval(
        "Prompts to answer, greedily, before and after training, in the log and in report.html: a .txt file with one a "
        "line, or rows as --exact-match-dataset takes them.",
        None,
        metavar="PATH|ID",
        unset="none",
    )
    sample_steps: int | None = _eval(
        "Steps from one answering of --sample-prompts to the next.",
        None,
        unit="steps",
        check=AT_LEAST_1,
        unset="only before and after training",
    )
    sample_max_new_tokens: int = _eval("Longest answer to --sample-prompts.", 128, unit="tokens", check=AT_LEAST_1)

    dry_run: bool = _plan(
        "Print what the run takes of GPU memory, host memory and disk, and the nearest settings that fit, and leave. "
        "It reads config.json alone, no weights and no rows; the exit status is 1 where a GPU does not hold it.",
        False,
    )
    gpus: int | None = _plan(
        "GPUs to plan for.", None, unit="GPUs", check=AT_LEAST_1, unset="torchrun's ranks, or this machine's GPUs"
    )
    gpu_memory_gib: float | None = _plan(
        "Memory of one GPU to plan for.", None, unit="GiB", check=POSITIVE, unset="that of this machine's GPUs"
    )

    gpu: CardName | None = _plan(
        "Card to plan for: how much memory it has and, an estimate, how fast it is.", None, unset="this machine's"
    )
    host_memory_gib: float | None = _plan(
        "Host memory of the machine to plan for, for all ranks on it.",
        None,
        unit="GiB",
        check=POSITIVE,
        unset="this machine's, unless other GPUs are planned for",
    )
    sweep: bool = _plan(
        "Print too what other cards, and other numbers of them, train: the longest row that each holds, and how fast.",
        False,
    )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Every ``--dataset``."""
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset

    @property
    def eval_sets(self) -> dict[str, str]:
        """Every ``--eval-dataset`` by its name, which is "" of one that was given none."""
        given = self.eval_dataset or ()
        return eval_sets((given,) if isinstance(given, str) else given)

    @property
    def measures(self) -> list[str]:
        """What evaluations measure."""
        names = [""] if self.eval_split else list(self.eval_sets)
        return measures(names, exact_match=self.exact_match_dataset is not None)

    @property
    def checkpointing(self) -> Checkpointing:
        """What the options say, once "auto" is replaced (``plan.checkpointing``)."""
        assert self.activation_checkpointing != "auto", "auto is chosen by the plan first"
        return Checkpointing(self.activation_checkpointing, self.checkpointed_layers)

    @property
    def profiled_steps(self) -> tuple[int, int]:
        """The first and the last step of --profile."""
        first, _, last = (self.profile or "").partition("-")
        return int(first), int(last or first)

    @property
    def skip_bad_rows(self) -> int:
        """How many rows of a dataset ``--bad-rows`` lets be left out."""
        return skipped_bad_rows(self.bad_rows)

    def __post_init__(self) -> None:
        check_values(self)
        _check_profile(self)
        if not self.datasets:
            raise ValueError("--dataset must name at least one dataset, got an empty list")
        _check_weights(self.dataset_weights, self.datasets)
        skipped_bad_rows(self.bad_rows)
        if self.streaming and self.max_steps < 1:
            raise ValueError("--streaming reads as many rows as --max-steps takes: give --max-steps")
        _check_planned(self)
        if self.eval_dataset and self.eval_split:
            raise ValueError(f"--eval-split is for runs without --eval-dataset, got {self.eval_split} and one")
        if self.eval_steps and not (self.eval_sets or self.eval_split or self.save_best == EXACT_MATCH):
            raise ValueError("--eval-steps needs rows to evaluate on: give --eval-dataset or --eval-split")
        _check_best(self)
        if unknown := [name for name in self.report_to if name not in TRACKERS]:
            raise ValueError(f"--report-to takes {', '.join(TRACKERS)}, got {unknown[0]!r}")
        if self.sample_steps and not self.sample_prompts:
            raise ValueError("--sample-steps needs prompts to answer: give --sample-prompts")
        if self.one_example_per_answer and self.train_on == "all":
            raise ValueError("--one-example-per-answer learns the answers: it does not go with --train-on all")
        _check_checkpointing(self)
        if self.cpu_offload and self.activation_checkpointing in ("none", "selective"):
            raise ValueError(
                "--cpu-offload goes with --activation-checkpointing full or offloaded, which compute a layer again "
                f"when its weights are back, not with {self.activation_checkpointing}"
            )
        if self.sharding == "replicate" and (self.cpu_offload or self.dp_replicate > 1):
            other = "--cpu-offload" if self.cpu_offload else f"--dp-replicate {self.dp_replicate}"
            raise ValueError(f"--sharding replicate keeps all weights on every GPU, which {other} contradicts")
        if self.cpu_offload and self.reshard_after_forward == "never":
            raise ValueError("--cpu-offload frees each layer after its forward: leave --reshard-after-forward out")
        _check_calibrated(self)
        _check_targets(self.lora_target_modules)
        _check_patterns("--lora-rank-pattern", self.lora_rank_pattern)
        _check_patterns("--lora-alpha-pattern", self.lora_alpha_pattern)


def _check_best(config: TrainConfig) -> None:
    stopping, measured = config.early_stopping_patience is not None, config.measures
    if not config.save_best:
        if stopping or config.early_stopping_threshold:
            raise ValueError("--early-stopping-patience and -threshold need --save-best, which says what is compared")
        return
    if config.save_best not in measured:
        known = ", ".join(measured) or "nothing: give --eval-dataset, --eval-split or --exact-match-dataset"
        raise ValueError(f"--save-best {config.save_best!r} is not measured by this run, which measures {known}")
    if not config.eval_steps:
        raise ValueError("--save-best compares evaluations: say with --eval-steps how often there is one")
    if config.early_stopping_threshold and not stopping:
        raise ValueError("--early-stopping-threshold is for --early-stopping-patience")


def _check_calibrated(config: TrainConfig) -> None:
    if config.random_init and (config.calibrate or config.lora_init == "residual"):
        raise ValueError("--random-init draws weights: --calibrate and --lora-init residual are for real ones")
    if config.adapter and config.lora_init == "residual":
        raise ValueError("--lora-init residual begins a new adapter: leave out --adapter, or it")
    if config.original_model and config.lora_init != "residual":
        raise ValueError("--original-model is for --lora-init residual")
    if config.streaming and (config.calibrate or config.lora_init == "residual"):
        raise ValueError("--streaming does not know all rows: it does not go with --calibrate or --lora-init residual")


def _check_planned(config: TrainConfig) -> None:
    fields = ("gpus", "gpu_memory_gib", "gpu", "host_memory_gib", "sweep")
    given = [f"--{name.replace('_', '-')}" for name in fields if getattr(config, name)]
    if given and not config.dry_run:
        raise ValueError(f"{' and '.join(given)}: for `qsharded plan` (--dry-run) alone")


def _check_profile(config: TrainConfig) -> None:
    if config.profile is None:
        return
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", config.profile):
        raise ValueError(f"--profile must be a step (12) or the first and the last (12-14), got {config.profile!r}")
    first, last = config.profiled_steps
    if first > last:
        raise ValueError(f"--profile must name the first step before the last, got {config.profile}")


def _check_checkpointing(config: TrainConfig) -> None:
    if config.checkpointed_layers is None:
        return
    if config.activation_checkpointing in ("auto", "none"):
        raise ValueError(
            "--checkpointed-layers says for how many layers --activation-checkpointing full, offloaded or selective "
            f"is; it does not go with {config.activation_checkpointing}"
        )
    if config.cpu_offload:
        raise ValueError("--cpu-offload needs all layers checkpointed: leave --checkpointed-layers out")


def _check_weights(weights: list[float], datasets: tuple[str, ...]) -> None:
    if not weights:
        return
    if len(weights) != len(datasets):
        raise ValueError(
            f"--dataset-weights must be one for each --dataset: there are {len(weights)} for {len(datasets)} "
            f"({', '.join(datasets)})"
        )
    for weight, dataset in zip(weights, datasets, strict=True):
        if weight <= 0:
            raise ValueError(f"--dataset-weights must be above 0, got {weight:g} for {dataset}: leave the dataset out")


def _check_targets(targets: str | list[str]) -> None:
    if not targets:
        raise ValueError("--lora-target-modules must name at least one layer")
    if isinstance(targets, str) and targets != "all-linear":
        _check_regex("--lora-target-modules", targets)


def _check_patterns(flag: str, pattern: dict[str, int] | dict[str, float]) -> None:
    for key, value in pattern.items():
        _check_regex(flag, key)
        if value <= 0:
            raise ValueError(f"{flag} must be above 0 for every KEY, got {value} for {key!r}")


def _check_regex(flag: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{flag} must be a regular expression, got {text!r}: {error}") from error
