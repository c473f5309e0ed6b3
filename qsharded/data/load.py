"""From a dataset's files to examples, whole and checked before anything trains."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, get_args

from qsharded.data.encode import encode
from qsharded.data.examples import Dataset, Example
from qsharded.data.formats import Record, parse_row
from qsharded.data.omissions import Omission
from qsharded.data.records import Rows, read_rows
from qsharded.data.render import Rendered, TrainOn, render
from qsharded.data.row_length import How, without_long_rows
from qsharded.data.tokenizer import Tokenizer
from qsharded.utils import heartbeat

Overlong = Literal["drop", "truncate"]

# Enough to keep the tokenizer's threads busy.
_ROWS_AT_ONCE = 512


def load_examples(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    format: str = "auto",
    max_length: int,
    overlong: Overlong = "drop",
    train_on: TrainOn = "assistant",
    one_example_per_answer: bool = False,
    split: str = "train",
) -> Dataset:
    """Read, render and tokenize a dataset.

    Conversations are rendered by the chat template, and the assistant's turns are trained on, each with its end-of-turn
    token. Of a prompt and completion, the completion and EOS are trained on; of text, all and EOS; BOS comes first in
    these two where the tokenizer adds one. Messages behind the last trained one are left out: nothing depends on them.

    Args:
        source: a file, folder or Hub dataset; see :func:`qsharded.data.records.read_rows`.
        format: one of :data:`qsharded.data.formats.FORMATS`.
        max_length: in tokens, at least 2.
        overlong: what becomes of longer rows.
        train_on: "all" learns every token of conversations and prompts too.
        one_example_per_answer: make of a conversation one example for each answer to learn, each rendered as it would
            be at generation, its reasoning included.
        split: which files of a folder or Hub dataset.

    Raises:
        ValueError: a malformed row (the message starts with ``file:line``), no rows, nothing to learn in them, or an
            argument out of range.
    """
    _check(max_length, overlong, train_on)
    if one_example_per_answer and train_on == "all":
        raise ValueError("one example per answer learns the answers: it does not go with train_on 'all'")
    dataset = Dataset([])
    how: How = partial(render, tokenizer=tokenizer, train_on=train_on, per_answer=one_example_per_answer)
    if overlong == "drop" and not one_example_per_answer:
        how = without_long_rows(how, dataset, tokenizer, max_length)
    rows = _rendered_rows(dataset, read_rows(source, split=split), format, how)
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        written = [(origin, row) for origin, row in chunk if row.text.strip()]
        dataset.empty += len(chunk) - len(written)
        for (origin, _), example in zip(written, encode([row for _, row in written], tokenizer), strict=True):
            _add(dataset, example, origin, max_length, overlong)
    _check_any(dataset, source, max_length)
    return dataset


def _check(max_length: int, overlong: str, train_on: str) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    for name, value, known in (("overlong", overlong, get_args(Overlong)), ("train_on", train_on, get_args(TrainOn))):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")


def _rendered_rows(
    dataset: Dataset, rows: Rows, format: str, how: Callable[[Record], list[Rendered]]
) -> Iterator[tuple[str, Rendered]]:
    """Each text with its row's origin; what the texts of a row lack is counted in ``dataset``, once a row."""
    for origin, row in rows:
        heartbeat.beat("reading rows")
        try:
            texts = how(parse_row(row, format))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        lacking: dict[str, Omission] = {}
        for one in chain.from_iterable(text.omissions for text in texts):
            lacking.setdefault(one.kind, one)
        for kind, first in lacking.items():
            dataset.count_omission(kind, f"{origin}, {first}")
        yield from ((origin, text) for text in texts)


def _add(dataset: Dataset, example: Example, origin: str, max_length: int, overlong: Overlong) -> None:
    if not example.trained_tokens:
        raise ValueError(f"{origin}: the row has no token to learn")
    fits = len(example) <= max_length
    kept = example if fits else Example(example.ids[:max_length], example.trained[:max_length])
    if fits or (overlong == "truncate" and kept.trained_tokens):
        dataset.examples.append(kept)
        dataset.truncated += not fits
    else:
        dataset.dropped += 1


def _check_any(dataset: Dataset, source: str | Path, max_length: int) -> None:
    if not dataset.examples:
        raise ValueError(
            f"{source} has no tokens to train on: {dataset.dropped} rows were left out as longer than "
            f"max_length {max_length}, {dataset.empty} as empty"
        )
