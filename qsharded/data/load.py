"""From a dataset's files to examples, whole and checked before anything trains."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, get_args

from qsharded.data.encode import example_of
from qsharded.data.examples import Dataset, Example
from qsharded.data.formats import Record, parse_row
from qsharded.data.omissions import Omission
from qsharded.data.records import Rows, read_rows
from qsharded.data.render import Rendered, TrainOn, render
from qsharded.data.tokenizer import Encoded, Tokenizer
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
    reading = Reading(
        max_length=max_length,
        format=format,
        overlong=overlong,
        train_on=train_on,
        one_example_per_answer=one_example_per_answer,
    )
    dataset = reading.examples(read_rows(source, split=split), tokenizer)
    reading.check_any(dataset, len(dataset.examples), str(source))
    return dataset


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become examples: all that decides it, beside the rows and the tokenizer. See :func:`load_examples`.

    Raises:
        ValueError: an argument out of range.
    """

    max_length: int
    format: str = "auto"
    overlong: Overlong = "drop"
    train_on: TrainOn = "assistant"
    one_example_per_answer: bool = False

    def __post_init__(self) -> None:
        _check(self.max_length, self.overlong, self.train_on)
        if self.one_example_per_answer and self.train_on == "all":
            raise ValueError("one example per answer learns the answers: it does not go with train_on 'all'")

    def examples(self, rows: Rows, tokenizer: Tokenizer) -> Dataset:
        """The examples of ``rows``, in their order; there may be none.

        Raises:
            ValueError: a malformed row; the message starts with its origin.
        """
        examples: list[Example] = []
        dataset = Dataset(examples)
        how = partial(render, tokenizer=tokenizer, train_on=self.train_on, per_answer=self.one_example_per_answer)
        rendered = _rendered_rows(dataset, rows, self.format, how)
        while chunk := list(islice(rendered, _ROWS_AT_ONCE)):
            written = [(origin, row) for origin, row in chunk if row.text.strip()]
            dataset.empty += len(chunk) - len(written)
            all_encoded = tokenizer.encode_all([row.text for _, row in written])
            for (origin, row), encoded in zip(written, all_encoded, strict=True):
                if row.later and self.overlong == "drop" and len(encoded) > self.max_length:
                    dataset.dropped += 1
                    continue
                with _named(origin):
                    example = _example(dataset, origin, row, encoded, tokenizer)
                    examples += self._kept(dataset, example)
        return dataset

    def _kept(self, dataset: Dataset, example: Example) -> list[Example]:
        """The example as it is, cut, or not at all; which of these is counted."""
        if not example.trained_tokens:
            raise ValueError("the row has no token to learn")
        if len(example) <= self.max_length:
            return [example]
        cut = Example(example.ids[: self.max_length], example.trained[: self.max_length])
        if self.overlong == "truncate" and cut.trained_tokens:
            dataset.truncated += 1
            return [cut]
        dataset.dropped += 1
        return []

    def check_any(self, dataset: Dataset, count: int, source: str) -> None:
        """Raise ValueError if ``count``, that of the examples which became of ``source``, is none."""
        if not count:
            raise ValueError(
                f"{source} has no tokens to train on: {dataset.dropped} rows were left out as longer than "
                f"max_length {self.max_length}, {dataset.empty} as empty"
            )


def _check(max_length: int, overlong: str, train_on: str) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    for name, value, known in (("overlong", overlong, get_args(Overlong)), ("train_on", train_on, get_args(TrainOn))):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")


def _rendered_rows(
    dataset: Dataset, rows: Rows, format: str, how: Callable[[Record], list[Rendered]]
) -> Iterator[tuple[str, Rendered]]:
    """Each text with its row's origin."""
    for origin, row in rows:
        heartbeat.beat("reading rows")
        with _named(origin):
            texts = how(parse_row(row, format))
        _count_omissions(dataset, origin, chain.from_iterable(text.omissions for text in texts))
        yield from ((origin, text) for text in texts)


def _example(dataset: Dataset, origin: str, row: Rendered, encoded: Encoded, tokenizer: Tokenizer) -> Example:
    complete = row.completed()
    if row.later:
        _count_omissions(dataset, origin, complete.omissions)
    if complete.text != row.text:
        (encoded,) = tokenizer.encode_all([complete.text])
    return example_of(complete, encoded, tokenizer)


def _count_omissions(dataset: Dataset, origin: str, found: Iterable[Omission]) -> None:
    """Of each kind once a row."""
    lacking: dict[str, Omission] = {}
    for one in found:
        lacking.setdefault(one.kind, one)
    for kind, first in lacking.items():
        dataset.count_omission(kind, f"{origin}, {first}")


@contextmanager
def _named(origin: str) -> Iterator[None]:
    """Have what is said of a row begin with the place that it came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
