"""What a run trains on and evaluates: datasets read, checked against the model, and cut into steps."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qsharded.config import TrainConfig
from qsharded.data import Dataset, Mixture, Prompt, StepLoader, Tokenizer, load_prompts
from qsharded.data.facts import facts_of
from qsharded.data.notes import data_notes
from qsharded.data.shown import text
from qsharded.distributed.world import World
from qsharded.training.data_options import date_note, preview
from qsharded.training.resuming import Resumed, kept_accumulation
from qsharded.training.tokenized import load_datasets


@dataclass(frozen=True)
class RunData:
    """What is trained on and evaluated, a line on the steps that it makes, where there is something to say, and what is
    told of the rows that prompts were taken from."""

    train: Mixture
    evaluation: Dataset | None
    prompts: Sequence[Prompt]
    loader: StepLoader
    note: str
    tokenizer: Tokenizer
    of_prompts: Dataset

    def lines(self, config: TrainConfig) -> list[str]:
        """What of all this the run's summary tells, as the preview does."""
        taken, lines = self.train.rows_an_epoch(), date_note(self.tokenizer)
        for (name, part), rows in zip(self.train.parts.items(), taken, strict=True):
            share = f"; {rows:,} an epoch ({rows / sum(taken):.1%} of the mixture)" if len(taken) > 1 else ""
            shown = preview(config, f"data {name}", part, self.tokenizer, share)
            lines += text.lines(shown, text.marks_for(sys.stdout))
        if self.evaluation is not None:
            shown = preview(replace(config, show_rows=0), "evaluation", self.evaluation, self.tokenizer)
            lines += text.lines(shown, text.BRACKETS)
        # prompts are rendered up to an answer already: no option keeps more
        return lines + [f"exact match: {note}" for note in data_notes(self.of_prompts, one_example_per_answer=True)]


def read_data(
    config: TrainConfig, world: World, tokenizer: Tokenizer, vocab_size: int, resumed: Resumed | None
) -> RunData:
    """Read and tokenize all of it. Every rank calls this.

    Raises:
        ValueError: a row that cannot be read, or whose ids are beyond ``vocab_size``, that of the model.
    """
    accumulation, note = kept_accumulation(config, world.size, resumed)
    batches = replace(config, gradient_accumulation_steps=accumulation)
    train, evaluation = load_datasets(batches, tokenizer, world)
    told = Dataset([])
    prompts = _prompts(config, tokenizer, told)
    _check_vocabulary(vocab_size, train, evaluation, prompts)
    loader = _loader(batches, world, tokenizer, train, config.per_device_train_batch_size, shuffle=True)
    return RunData(train, evaluation, prompts, loader, note, tokenizer, told)


def _prompts(config: TrainConfig, tokenizer: Tokenizer, told: Dataset) -> Sequence[Prompt]:
    if config.exact_match_dataset is None:
        return []
    return load_prompts(
        config.exact_match_dataset,
        tokenizer,
        format=config.dataset_format,
        columns=config.dataset_columns,
        skip_bad_rows=config.skip_bad_rows,
        counted=told,
    )


def _check_vocabulary(
    vocab_size: int, train_data: Mixture, eval_data: Dataset | None, prompts: Sequence[Prompt]
) -> None:
    """An id beyond the embedding would stop a GPU with no word of the row at fault."""
    read = [train_data.examples, eval_data.examples if eval_data else []]
    in_rows = (int(facts_of(examples)["largest"].max(initial=0)) for examples in read)
    largest = max(*in_rows, *(max(prompt.ids) for prompt in prompts))
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocab_size is {vocab_size}: the tokenizer's files and "
            "config.json are of different models, or tokens were added without resizing the embedding"
        )


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


def eval_loader(config: TrainConfig, world: World, tokenizer: Tokenizer, data: Dataset | None) -> StepLoader | None:
    """In the order of the rows, each once."""
    if data is None:
        return None
    return _loader(config, world, tokenizer, data, config.per_device_eval_batch_size, shuffle=False)
