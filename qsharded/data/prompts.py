"""Prompts with reference answers, from the same rows that training reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qsharded.data.bad_rows import refuse_bad_rows
from qsharded.data.call_form import fit_calls
from qsharded.data.columns import refuse_misspelt
from qsharded.data.examples import Dataset
from qsharded.data.formats import Conversation, PromptCompletion, Record, parse_row
from qsharded.data.omissions import omissions
from qsharded.data.records import find_rows
from qsharded.data.tokenizer import Tokenizer

TEXT_FILE = ".txt"


@dataclass(frozen=True)
class Prompt:
    """What generation is given, and what it is to answer.

    Attributes:
        ids: of the prompt, the chat template's assistant header included.
        text: the prompt as a person reads it: of a conversation, the last message before the answer.
        answer: the reference, as text; "" where there is none.
    """

    ids: list[int]
    text: str
    answer: str = ""


def load_prompts(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    format: str = "auto",
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: int = 0,
    counted: Dataset | None = None,
) -> list[Prompt]:
    """The rows of a dataset, each up to its last answer.

    Args:
        source, split: as for :func:`qsharded.data.load.load_examples`.
        format, columns, skip_bad_rows: as for :class:`qsharded.data.load.Reading`.
        counted: gets what is told of the rows: bad ones, and what the chat template leaves out of prompts.

    Raises:
        ValueError: more bad rows than may be skipped: malformed, one whose last message is not the assistant's, or
            plain text; each is named by ``file:line``, up to a number of them. No rows at all, or columns that none has
            of them, where others are there.
    """
    prompts, told, columns = [], Dataset([]) if counted is None else counted, columns or {}
    for origin, row in find_rows(source, split=split):
        try:
            if isinstance(row, ValueError):
                raise row
            told.columns |= row.keys() & set(columns.values())
            prompts.append(_prompt(parse_row(row, format, columns), tokenizer, told, origin))
        except ValueError as error:
            told.count_bad(f"{origin}: {error}")
            refuse_bad_rows(told.bad, told.bad_reasons, skip_bad_rows, all_read=False)
    refuse_misspelt(told.columns, columns)
    refuse_bad_rows(told.bad, told.bad_reasons, skip_bad_rows, all_read=True)
    if not prompts:
        raise ValueError(f"{source} holds no rows to take prompts from")
    return prompts


def plain_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """The lines of a text file but the blank ones, as a user writes them in a chat, or, where the tokenizer has no chat
    template, as the beginning of a text.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None
    prompts = [Prompt(_asked(line, tokenizer), line) for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line")
    return prompts


def _asked(text: str, tokenizer: Tokenizer) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.with_bos(tokenizer.encode(text))
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True))


def _prompt(record: Record, tokenizer: Tokenizer, told: Dataset, origin: str) -> Prompt:
    match record:
        case Conversation(messages, trained, tools) if trained[-1] and len(messages) > 1:
            template = tokenizer.template_for(tools)
            given = fit_calls(template, replace(record, messages=messages[:-1], trained=[False] * (len(messages) - 1)))
            text = tokenizer.render(given.messages, add_generation_prompt=True, tools=tools)
            told.count_omissions(origin, omissions(template, given, tokenizer.render(given.messages, tools=tools)))
            return Prompt(tokenizer.encode(text), messages[-2].get("content", ""), messages[-1].get("content", ""))
        case PromptCompletion(prompt, completion):
            return Prompt(tokenizer.with_bos(tokenizer.encode(prompt)), prompt, completion)
    raise ValueError("a prompt with its answer needs a conversation that ends with the assistant, or a completion")
