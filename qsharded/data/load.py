"""From a dataset's files to examples, whole and checked before anything trains."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

from qsharded.data.bad_rows import refuse_bad_rows
from qsharded.data.columns import check_columns, refuse_misspelt
from qsharded.data.empty_answers import without_empty_answers
from qsharded.data.encode import example_of
from qsharded.data.encoded import Encoded
from qsharded.data.examples import Dataset, Example
from qsharded.data.formats import Conversation, Record, parse_row
from qsharded.data.notes import PROMPT_TOO_LONG, TRUNCATED, data_notes
from qsharded.data.omissions import UNHEEDED, Omission
from qsharded.data.records import FoundRows, Row, find_rows
from qsharded.data.render import Rendered, TrainOn, Wanted, render
from qsharded.data.row_length import most_characters
from qsharded.data.tokenizer import Tokenizer
from qsharded.utils import heartbeat

Overlong = Literal["drop", "truncate"]

# Enough to keep the tokenizer's threads busy.
_ROWS_AT_ONCE = 512


def load_examples(source: str | Path, tokenizer: Tokenizer, *, split: str = "train", **reading: Any) -> Dataset:
    """Read, render and tokenize a dataset.

    Conversations are rendered by the chat template, and the assistant's turns are trained on, each with its end-of-turn
    token. Of a prompt and completion, the completion and EOS are trained on; of text, all and EOS; BOS comes first in
    these two where the tokenizer adds one. Messages behind the last trained one are left out: nothing depends on them.

    Args:
        source: a file, folder or Hub dataset; see :func:`qsharded.data.records.read_rows`.
        split: which files of a folder or Hub dataset.
        reading: the attributes of :class:`Reading`, of which ``max_length`` is needed.

    Raises:
        ValueError: malformed rows (each named by ``file:line``, up to a number of them), no rows, nothing to learn in
            them, or an argument out of range.
    """
    how = Reading(**reading)
    dataset = how.examples(find_rows(source, split=split), tokenizer)
    how.check_any(dataset, len(dataset.examples), str(source))
    return dataset


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become examples: all that decides it, beside the rows and the tokenizer.

    Attributes:
        max_length: in tokens, at least 2.
        format: one of :data:`qsharded.data.formats.FORMATS`.
        overlong: what becomes of longer rows.
        train_on: "all" learns every token of conversations and prompts too.
        one_example_per_answer: make of a conversation one example for each answer to learn, each rendered as it would
            be at generation, its reasoning included.
        train_on_turn_ends: do so too where the chat template marks the content alone by ``{% generation %}``.
        train_on_empty_answers: on answers without content or tool calls too, that is, on ending the turn at once.
        columns: field of a format -> the rows' column of it; see :mod:`qsharded.data.columns`.
        skip_bad_rows: how many rows that cannot be used may be left out.

    Raises:
        ValueError: an argument out of range.
    """

    max_length: int
    format: str = "auto"
    overlong: Overlong = "drop"
    train_on: TrainOn = "assistant"
    one_example_per_answer: bool = False
    train_on_turn_ends: bool = True
    train_on_empty_answers: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad_rows: int = 0

    def __post_init__(self) -> None:
        _check(self.max_length, self.overlong, self.train_on)
        check_columns(self.columns)
        if self.one_example_per_answer and self.train_on == "all":
            raise ValueError("one example per answer learns the answers: it does not go with train_on 'all'")

    @property
    def of_part(self) -> "Reading":
        """How some of the rows are read: which rows are bad is counted, and what is too many is for the whole to say,
        by :meth:`check_bad` and :meth:`check_any`."""
        return replace(self, skip_bad_rows=sys.maxsize)

    def examples(self, rows: FoundRows, tokenizer: Tokenizer) -> Dataset:
        """The examples of ``rows``, in their order; there may be none.

        Raises:
            ValueError: as :meth:`check_bad`, before all rows are read.
        """
        examples: list[Example] = []
        dataset = Dataset(examples)
        rendered = self._rendered(dataset, self._parsed(dataset, rows), tokenizer)
        while block := list(islice(rendered, _ROWS_AT_ONCE)):
            examples += self._encoded(dataset, block, tokenizer)
        return dataset

    def check_any(self, dataset: Dataset, count: int, source: str) -> None:
        """Raise ValueError for misspelt columns, bad rows, or if ``count``, that of the examples which became of
        ``source``, is none."""
        self.check_columns(dataset)
        self.check_bad(dataset, all_read=True)
        if not count:
            raise ValueError(
                f"{source} has no tokens to train on: {dataset.dropped} rows were left out as longer than "
                f"max_length {self.max_length}, {dataset.empty} as empty"
                + "".join(f"\n{note}" for note in data_notes(dataset, self.one_example_per_answer))
            )

    def check_columns(self, dataset: Dataset) -> None:
        """Raise ValueError if no row of ``dataset`` has one of the ``columns``, and some have others of them."""
        refuse_misspelt(dataset.columns, self.columns)

    def check_bad(self, dataset: Dataset, *, all_read: bool = False) -> None:
        """Raise ValueError if ``dataset`` has more bad rows than may be skipped, once no more of them can be listed."""
        refuse_bad_rows(dataset.bad, dataset.bad_reasons, self.skip_bad_rows, all_read=all_read)

    def _parsed(self, dataset: Dataset, rows: FoundRows) -> Iterator[tuple[str, Record | ValueError]]:
        """What each row says, or is wrong in it; those that say nothing to learn are counted in ``dataset``."""
        keep_empty = self.train_on_empty_answers or self.train_on == "all"
        for origin, row in rows:
            heartbeat.beat("reading rows")
            try:
                record, empty = self._record(dataset, row), None
            except ValueError as error:
                yield origin, error
                continue
            if self.train_on != "all" and isinstance(record, Conversation) and record.unheeded is not None:
                dataset.count_omissions(origin, [_unheeded(record, record.unheeded)])
            said, empty = (record, None) if keep_empty else without_empty_answers(record)
            if empty is not None:
                dataset.count_omission(empty.kind, f"{origin}, {empty}")
            if said is not None:
                yield origin, said
            else:
                dataset.empty += 1

    def _record(self, dataset: Dataset, row: Row | ValueError) -> Record:
        if isinstance(row, ValueError):
            raise row
        dataset.columns |= row.keys() & set(self.columns.values())
        return parse_row(row, self.format, self.columns)

    def _rendered(
        self, dataset: Dataset, rows: Iterable[tuple[str, Record | ValueError]], tokenizer: Tokenizer
    ) -> Iterator[tuple[str, Rendered | ValueError]]:
        """Each text with its row's origin; blank texts, and those that are certainly too long, are counted alone."""
        longest = most_characters(tokenizer, self.max_length) if self.overlong == "drop" else sys.maxsize
        for origin, record in rows:
            try:
                texts = self._texts(record, tokenizer)
            except ValueError as error:
                yield origin, error
                continue
            dataset.count_omissions(origin, chain.from_iterable(text.omissions for text in texts))
            for text in texts:
                if len(text.text) > longest:
                    dataset.dropped += 1
                elif text.says_nothing or not text.text.strip():
                    dataset.empty += 1
                else:
                    yield origin, text

    def _texts(self, record: Record | ValueError, tokenizer: Tokenizer) -> list[Rendered]:
        if isinstance(record, ValueError):
            raise record
        return render(record, tokenizer, self._wanted)

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.train_on, self.one_example_per_answer, self.train_on_turn_ends, self.train_on_empty_answers)

    def _encoded(
        self, dataset: Dataset, block: Sequence[tuple[str, Rendered | ValueError]], tokenizer: Tokenizer
    ) -> Iterator[Example]:
        """The examples of some texts; bad rows are counted here, in their order."""
        encoded = iter(tokenizer.encode_all([text.text for _, text in block if isinstance(text, Rendered)]))
        for origin, text in block:
            try:
                if isinstance(text, ValueError):
                    raise text
                yield from self._kept(dataset, origin, text, next(encoded), tokenizer)
            except ValueError as error:
                dataset.count_bad(f"{origin}: {error}")
                self.check_bad(dataset)

    def _kept(
        self, dataset: Dataset, origin: str, text: Rendered, encoded: Encoded, tokenizer: Tokenizer
    ) -> list[Example]:
        """The example as it is, cut, or not at all; which of these is counted."""
        if text.later and self.overlong == "drop" and len(encoded) > self.max_length:
            dataset.dropped += 1
            return []
        complete = text.completed()
        if text.later:
            dataset.count_omissions(origin, complete.omissions)
        if complete.says_nothing:
            dataset.empty += 1
            return []
        if complete.text != text.text:
            (encoded,) = tokenizer.encode_all([complete.text])
        example = example_of(complete, encoded, tokenizer)
        if not example.trained_tokens:
            raise ValueError("the row has no token to learn")
        if len(example) <= self.max_length:
            return [example]
        cut = Example(example.ids[: self.max_length], example.trained[: self.max_length])
        if self.overlong == "truncate":
            kind = TRUNCATED if cut.trained_tokens else PROMPT_TOO_LONG
            dataset.count_omission(kind, f"{origin}, of {len(example):,} tokens")
            if cut.trained_tokens:
                dataset.truncated += 1
                return [cut]
        dataset.dropped += 1
        return []


def _unheeded(chat: Conversation, number: int) -> Omission:
    message = chat.messages[number]
    return Omission(UNHEEDED, number, f"{message['role']}: {message.get('content', '')}")


def _check(max_length: int, overlong: str, train_on: str) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    for name, value, known in (("overlong", overlong, get_args(Overlong)), ("train_on", train_on, get_args(TrainOn))):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
