"""Chat templates: Jinja programs that come with a tokenizer and write a conversation as text.

They are other people's programs, so they run in Jinja's immutable sandbox, under limits. What they find there
(filters, functions, variables, white-space rules) is what transformers' ``apply_chat_template`` gives them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from typing import Any, ClassVar, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from qsharded.data.messages import REASONING_KEYS, Message
from qsharded.data.template_limits import LimitedEnvironment, Patience, limited

Span = tuple[int, int]

_OF_EACH_CALL = {"messages", "tools", "documents", "add_generation_prompt"}

_REASONING = frozenset(REASONING_KEYS)
# Unicode noncharacters, for use inside a program only: they stand in no text meant for reading.
_BEGIN, _END = "\ufdd0", "\ufdd1"


class _Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``, by which a template marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012, as the base class declares it
    marks: ClassVar = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.marks)
        return nodes.Scope([begin, *body, end]).set_lineno(line)


class _MarkedGeneration(_Generation):
    marks: ClassVar = (_BEGIN, _END)


class ChatTemplate:
    """A template with the variables that the tokenizer sets for it.

    Args:
        source: the Jinja program.
        variables: the texts of special tokens, as ``bos_token``, and what the user sets.
        today: the date for programs that ask for it; None: today's.

    Raises:
        ValueError: ``source`` is no valid Jinja, or ``variables`` has one that each call sets.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], today: date | None = None) -> None:
        if taken := _OF_EACH_CALL & variables.keys():
            raise ValueError(f"the chat template's variable {min(taken)!r} comes from the rows; it cannot be set")
        self._source = source
        self._variables = variables
        self._today = today
        self._patience = Patience()
        self._plain = self._compile(_Generation)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: all but compiled programs, which cannot be sent."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Template)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plain = self._compile(_Generation)

    @property
    def identity(self) -> list[Any]:
        """Values of JSON that differ between templates that may write a conversation otherwise.

        The date is one where the program asks for it.
        """
        today = (self._today or datetime.now().date()).isoformat() if self._asks_for_date else None
        return [self._source, self._variables, today]

    @property
    def writes_today(self) -> bool:
        """Whether the program asks for today's date, so that it may write other text tomorrow."""
        return self._asks_for_date and self._today is None

    @property
    def _asks_for_date(self) -> bool:
        return "strftime_now" in self._source

    @cached_property
    def _marked(self) -> Template:
        return self._compile(_MarkedGeneration)

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template marks the assistant's text by ``{% generation %}``."""
        tokens = [(kind, value) for _, kind, value in _environment(_Generation).lex(self._source)]
        return ("name", "generation") in tokens and ("name", "endgeneration") in tokens

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text, followed by the assistant's header if ``add_generation_prompt``.

        Raises:
            ValueError: the template refuses the conversation, or fails on it.
        """
        return self._run(self._plain, messages, add_generation_prompt, tools)

    def generation_spans(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[Span]:
        """[start, end) in characters of what the template marks in the text that :meth:`render` gives.

        Raises:
            ValueError: the marks cannot be found again in the text.
        """
        marked = self._run(self._marked, messages, False, tools)
        text, spans = _unmark(marked)
        if text != self.render(messages, tools=tools):
            raise ValueError(
                "the spans that the chat template marks cannot be followed: it works on marked text further, or a "
                "message holds the characters U+FDD0 or U+FDD1"
            )
        return spans

    def _compile(self, generation: type[Extension]) -> Template:
        try:
            with limited("the chat template's compilation"):
                environment = _environment(generation)
                environment.globals["strftime_now"] = self._strftime_now
                return environment.from_string(self._source)
        except (TemplateError, SyntaxError) as error:  # Python's, of the program that Jinja writes
            raise ValueError(f"the chat template is not valid: {error}") from error

    def _strftime_now(self, format: str) -> str:
        now = datetime.now() if self._today is None else datetime.combine(self._today, time())
        return now.strftime(format)

    def _run(self, template: Template, messages: Sequence[Message], prompt: bool, tools: list[Any] | None) -> str:
        try:
            with self._patience.limited("its program"):
                return template.render(
                    **self._variables,
                    messages=[_with_reasoning(message) for message in messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                )
        except Exception as error:  # a template can fail as any program can
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _unmark(marked: str) -> tuple[str, list[Span]]:
    """The text without marks, and where each pair of marks stood in it."""
    pieces, spans, length = [], [], 0
    for number, piece in enumerate(marked.replace(_END, _BEGIN).split(_BEGIN)):
        if number % 2:
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), spans


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under the two names that templates read."""
    if _REASONING.isdisjoint(message):
        return message
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _environment(generation: type[Extension]) -> Environment:
    extensions: list[str | type[Extension]] = ["jinja2.ext.loopcontrols", generation]
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
