"""``python -m qsharded.preview``: rows as the model will see them, before anything trains."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.command import errors_named
from qsharded.config import TrainConfig, builtin_overrides, option, parse
from qsharded.config.options import AT_LEAST_0
from qsharded.data import Dataset, Tokenizer, load_prompts
from qsharded.data.bad_rows import refuse_bad_rows
from qsharded.data.notes import data_notes
from qsharded.data.prompts import TEXT_FILE
from qsharded.data.records import find_rows
from qsharded.data.shown import text
from qsharded.data.shown.page import page
from qsharded.distributed.world import World
from qsharded.training.data_options import date_note, preview, reading, template_options

_preview = partial(option, group="Preview")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(TrainConfig):
    """Show what a run would train on: rows as the model will see them with the trained tokens marked, how many rows and
    tokens there are and how long they are, what is left out, and what is wrong with bad rows.

    It takes the command line of qsharded train, or its --config; what is not listed here has no effect. Of the model it
    reads the tokenizer alone. Trained tokens are coloured on a terminal, and stand in [[ ]] elsewhere. The exit status
    is 1 where bad rows would stop the run.
    """

    prog: ClassVar[str] = "qsharded.preview"
    example: ClassVar[str] = "qsharded preview --model meta-llama/Llama-3.1-8B-Instruct --dataset rows.jsonl"
    common: ClassVar[tuple[str, ...]] = ()
    shown_groups: ClassVar[tuple[str, ...]] = ("Preview", "Model", "Data", "Length and batches")

    show_rows: int = _preview("Rows to show of each dataset, from the whole of it.", 5, unit="rows", check=AT_LEAST_0)
    show_characters: int = _preview(
        "Longest row that is shown whole; of longer ones the middle is left out. 0 shows all.",
        2000,
        unit="characters",
        check=AT_LEAST_0,
    )
    html: str | None = _preview("File to write the same to as a page.", None, metavar="FILE", unset="none")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, PreviewConfig, fill=builtin_overrides)
    with errors_named(config.prog, World.single_process(torch.device("cpu")), (ValueError, OSError)):
        run(config)


def run(config: PreviewConfig) -> None:
    """Print the preview, and write the page.

    Raises:
        ValueError: a mistake of the user's, or rows that would stop the run.
    """
    folder = find_checkpoint(config.model, config.revision, weights=False)
    tokenizer = Tokenizer.from_folder(folder, template_options(config))
    read = [(name, _read(config, source, split, tokenizer)) for name, source, split in _sources(config)]
    previews = [preview(config, name, data, tokenizer) for name, data in read]
    for line in date_note(tokenizer):
        print(line)
    for one in previews:
        print(*text.lines(one, text.marks_for(sys.stdout)), sep="\n")
    if config.html:
        Path(config.html).write_text(page(previews, f"{config.prog}: {config.model}"), encoding="utf-8")
    prompts = [(source, *_read_prompts(config, source, tokenizer)) for source in _prompt_sources(config)]
    for source, count, told in prompts:
        print(f"prompts {source}: {count:,}", *data_notes(told, one_example_per_answer=True), sep="\n")
    for data in [*(data for _, data in read), *(told for *_, told in prompts)]:
        refuse_bad_rows(data.bad, data.bad_reasons, config.skip_bad_rows, all_read=True)


def _sources(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """(its name for people, the dataset, the split) of everything that the run reads."""
    yield from ((f"data {source}", source, config.dataset_split) for source in config.datasets)
    for source in config.eval_sets.values():
        yield f"evaluation data {source}", source, config.eval_dataset_split or config.dataset_split


def _read(config: TrainConfig, source: str, split: str, tokenizer: Tokenizer) -> Dataset:
    """The dataset, with all of its bad rows counted, whatever their number."""
    how = reading(config)
    data = how.of_part.examples(find_rows(source, split=split), tokenizer)
    how.check_columns(data)
    return data


def _prompt_sources(config: TrainConfig) -> list[str]:
    """The datasets that the run takes prompts from; lines of text are no rows."""
    named = (config.exact_match_dataset, config.sample_prompts)
    return [source for source in dict.fromkeys(named) if source is not None and not source.endswith(TEXT_FILE)]


def _read_prompts(config: TrainConfig, source: str, tokenizer: Tokenizer) -> tuple[int, Dataset]:
    """(how many prompts, what is told of their rows)."""
    told = Dataset([])
    prompts = load_prompts(
        source,
        tokenizer,
        format=config.dataset_format,
        columns=config.dataset_columns,
        skip_bad_rows=sys.maxsize,
        counted=told,
    )
    return len(prompts), told


if __name__ == "__main__":
    main()
