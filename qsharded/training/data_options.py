"""What a run's options say of its rows, as the data code takes it."""

from qsharded.config import TrainConfig
from qsharded.data import Dataset, Tokenizer
from qsharded.data.load import Reading
from qsharded.data.shown.preview import Preview
from qsharded.data.template_options import TemplateOptions


def reading(config: TrainConfig) -> Reading:
    """How rows become examples."""
    return Reading(
        max_length=config.max_length,
        format=config.dataset_format,
        overlong=config.overlong,
        train_on=config.train_on,
        one_example_per_answer=config.one_example_per_answer,
        train_on_turn_ends=config.train_on_turn_ends,
        train_on_empty_answers=config.train_on_empty_answers,
        columns=config.dataset_columns,
        skip_bad_rows=config.skip_bad_rows,
    )


def template_options(config: TrainConfig) -> TemplateOptions:
    """What is otherwise about the chat template than the model's folder has it."""
    return TemplateOptions.given(config.chat_template, config.chat_template_kwargs, config.template_date)


def date_note(tokenizer: Tokenizer) -> list[str]:
    """A line where the rows are others tomorrow."""
    if not tokenizer.writes_today:
        return []
    return ["note: the chat template writes today's date, so rows are others tomorrow; --template-date fixes it"]


def preview(config: TrainConfig, name: str, data: Dataset, tokenizer: Tokenizer, share: str = "") -> Preview:
    """What is shown of a dataset; ``share``: what is said of its part in a mixture."""
    return Preview.of(
        name,
        data,
        tokenizer,
        max_length=config.max_length,
        one_example_per_answer=config.one_example_per_answer,
        rows=config.show_rows,
        characters=config.show_characters,
        share=share,
    )
