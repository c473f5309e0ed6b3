"""What a run trains on and evaluates: datasets read, checked against the model, and cut into steps."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qsharded.config import TrainConfig
from qsharded.data import Dataset, Example, Mixture, Prompt, StepLoader, Tokenizer, load_prompts
from qsharded.data.facts import facts_of
from qsharded.data.notes import data_notes
from qsharded.data.prompts import TEXT_FILE, plain_prompts
from qsharded.data.shown import text
from qsharded.data.vocabulary import refuse_beyond_vocabulary
from qsharded.data.window_loader import WindowLoader
from qsharded.distributed.world import World
from qsharded.training.data_options import date_note, preview
from qsharded.training.resuming import Resumed, kept_accumulation
from qsharded.training.tokenized import load_datasets


@dataclass(frozen=True)
class RunData:
    """What is trained on and evaluated, and a line on the steps that it makes, where there is something to say.

    Attributes:
        evaluation: the sets by their names.
        prompts: with the answers that they are to have.
        samples: whose answers are shown.
        of_prompts: what is told of the rows that prompts were taken from.
    """

    train: Mixture
    evaluation: Mapping[str, Dataset]
    prompts: Sequence[Prompt]
    samples: Sequence[Prompt]
    loader: StepLoader | WindowLoader
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
        for name, part in self.evaluation.items():
            shown = preview(replace(config, show_rows=0), f"evaluation {name}".strip(), part, self.tokenizer)
            lines += text.lines(shown, text.BRACKETS)
        if self.train.streams is not None:
            lines.append("note: these are the first rows of the streams; others are tokenized while the run trains")
        # prompts are rendered up to an answer already: no option keeps more
        return lines + [f"exact match: {note}" for note in data_notes(self.of_prompts, one_example_per_answer=True)]

    def late_notes(self, config: TrainConfig) -> list[str]:
        """What is told of the rows of streams when the run is at its end: more than when it began."""
        streams = self.train.streams
        return [] if streams is None else streams.notes(config.one_example_per_answer)


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
    prompts, samples = _prompts(config, tokenizer, config.exact_match_dataset, told), _samples(config, tokenizer)
    _check_vocabulary(vocab_size, [train.examples, *(part.examples for part in evaluation.values())], prompts, samples)
    loader = _training_loader(batches, world, tokenizer, train, vocab_size)
    return RunData(train, evaluation, prompts, samples, loader, note, tokenizer, told)


def _prompts(config: TrainConfig, tokenizer: Tokenizer, source: str | None, told: Dataset) -> Sequence[Prompt]:
    if source is None:
        return []
    return load_prompts(
        source,
        tokenizer,
        format=config.dataset_format,
        columns=config.dataset_columns,
        skip_bad_rows=config.skip_bad_rows,
        counted=told,
    )


def _samples(config: TrainConfig, tokenizer: Tokenizer) -> Sequence[Prompt]:
    source = config.sample_prompts
    if source is not None and source.endswith(TEXT_FILE):
        return plain_prompts(Path(source), tokenizer)
    return _prompts(config, tokenizer, source, Dataset([]))


def _check_vocabulary(vocab_size: int, read: Sequence[Sequence[Example]], *prompts: Sequence[Prompt]) -> None:
    in_rows = [int(facts_of(examples)["largest"].max(initial=0)) for examples in read]
    refuse_beyond_vocabulary(max(*in_rows, 0, *(max(prompt.ids) for some in prompts for prompt in some)), vocab_size)


def _training_loader(
    config: TrainConfig, world: World, tokenizer: Tokenizer, data: Mixture, vocab_size: int
) -> StepLoader | WindowLoader:
    def loader_of(mixture: Mixture) -> StepLoader:
        return _loader(config, world, tokenizer, mixture, config.per_device_train_batch_size, shuffle=True)

    def of_window(number: int) -> StepLoader:
        assert data.streams is not None, "only they have windows"
        mixture = data.streams.window(number)
        _check_vocabulary(vocab_size, [mixture.examples])
        return loader_of(mixture)

    return loader_of(data) if data.streams is None else WindowLoader(of_window)


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


def eval_loaders(
    config: TrainConfig, world: World, tokenizer: Tokenizer, data: Mapping[str, Dataset]
) -> dict[str, StepLoader]:
    """Of each set, in the order of the rows, each once."""
    size = config.per_device_eval_batch_size
    return {name: _loader(config, world, tokenizer, part, size, shuffle=False) for name, part in data.items()}
