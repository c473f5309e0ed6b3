"""From what a row says to the text that is tokenized, and which of it is trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from qsharded.data.answers import prompt_and_answer
from qsharded.data.call_form import fit_calls
from qsharded.data.chat import Span
from qsharded.data.formats import Conversation, PromptCompletion, Record, Text
from qsharded.data.omissions import Omission, find_omissions, judged, omissions, unwritten_answers
from qsharded.data.tokenizer import Tokenizer
from qsharded.data.turns import TurnUnclear, check_ending

TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Wanted:
    """What of a row is to be trained on.

    Attributes:
        train_on: "all": every token.
        per_answer: one text for each answer of a conversation.
        turn_ends: the end of a turn that the template's marks leave out, too.
        empty_answers: answers of which nothing is written, too.
    """

    train_on: TrainOn = "assistant"
    per_answer: bool = False
    turn_ends: bool = True
    empty_answers: bool = False


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        spans: what is trained on of ``text``, in characters; None: all of it.
        prompt: a beginning of ``text`` that is not trained on, and that generation will be given alone.
        bos: whether BOS comes first where the tokenizer adds one; a chat template writes its own.
        eos: whether EOS comes last, and is trained on.
        omissions: what the row has and the text lacks, and what is to be told of turns' ends.
        says_nothing: whether the text has nothing of what was to be trained on; the row is to be left out.
        later: gives what takes longer to find, where that was left for later: spans and omissions, or another text.
    """

    text: str
    spans: Sequence[Span] | None = None
    prompt: str = ""
    bos: bool = True
    eos: bool = True
    omissions: Sequence[Omission] = ()
    says_nothing: bool = False
    later: "Callable[[], Rendered] | None" = None

    def completed(self) -> "Rendered":
        """With nothing left for later.

        Raises:
            ValueError: as :func:`render`.
        """
        return self.later() if self.later else self


def render(record: Record, tokenizer: Tokenizer, wanted: Wanted) -> list[Rendered]:
    """The texts of a row: one, or one for each answer of a conversation that is to be trained.

    One text of a whole conversation is not complete: too long rows are left out before their turns are looked for.

    Raises:
        ValueError: no chat template for a conversation, one that refuses it or hides what the assistant says,
            no message of the assistant to learn, or text that no tokenizer takes.
    """
    match record:
        case Conversation():
            rendered = _render_chat(record, tokenizer, wanted)
        case PromptCompletion():
            prompt = record.prompt if wanted.train_on != "all" else ""
            rendered = [Rendered(record.prompt + record.completion, prompt=prompt)]
        case Text():
            rendered = [Rendered(record.text)]
    for one in rendered:
        _check_encodable(one.text)
    return rendered


def _render_chat(chat: Conversation, tokenizer: Tokenizer, wanted: Wanted) -> list[Rendered]:
    chat = fit_calls(tokenizer.template_for(chat.tools), chat)
    if wanted.train_on == "assistant":
        chat = _up_to_last_trained(chat)
    if wanted.per_answer:
        numbers = [number for number, trained in enumerate(chat.trained) if trained]
        return [_render_answer(chat, number, tokenizer, wanted) for number in numbers]
    text = tokenizer.render(chat.messages, tools=chat.tools)
    return [Rendered(text, later=partial(_complete, chat, text, tokenizer, wanted))]


def _complete(chat: Conversation, text: str, tokenizer: Tokenizer, wanted: Wanted) -> Rendered:
    try:
        return _render_whole(chat, text, tokenizer, wanted)
    except TurnUnclear:
        if sum(chat.trained) > 1:
            raise
    # With one answer, at the end, there is another way to know its text.
    rendered = _render_answer(chat, len(chat.trained) - 1, tokenizer, wanted)
    _check_encodable(rendered.text)
    return rendered


def _render_whole(chat: Conversation, text: str, tokenizer: Tokenizer, wanted: Wanted) -> Rendered:
    told = omissions(tokenizer.template_for(chat.tools), chat, text)
    spans = None
    if wanted.train_on == "assistant":
        if not wanted.empty_answers and (unwritten := unwritten_answers(chat, told)):
            return _without(chat, unwritten, text, told, tokenizer, wanted)
        spans, ends = tokenizer.assistant_spans(chat, text, train_on_turn_ends=wanted.turn_ends)
        told += ends
    return Rendered(text, spans, bos=False, eos=_lacks_end(text, tokenizer), omissions=told)


def _without(
    chat: Conversation, unwritten: set[int], text: str, told: list[Omission], tokenizer: Tokenizer, wanted: Wanted
) -> Rendered:
    """As :func:`_render_whole`, with these answers untrained."""
    trained = [want and number not in unwritten for number, want in enumerate(chat.trained)]
    if True not in trained:
        return Rendered(text, (), bos=False, eos=False, omissions=told, says_nothing=True)
    chat = _up_to_last_trained(replace(chat, trained=trained))
    kept = _render_whole(chat, tokenizer.render(chat.messages, tools=chat.tools), tokenizer, wanted)
    return replace(kept, omissions=[*told, *(one for one in kept.omissions if one not in told)])


def _lacks_end(text: str, tokenizer: Tokenizer) -> bool:
    """A template that ends the turn with no special token would never teach the model to stop."""
    return not text.rstrip().endswith(tokenizer.special_texts)


def _render_answer(chat: Conversation, number: int, tokenizer: Tokenizer, wanted: Wanted) -> Rendered:
    """Message ``number`` behind the prompt that generation would be given for it."""
    template = tokenizer.template_for(chat.tools)
    chat = replace(chat, messages=chat.messages[: number + 1], trained=[False] * number + [True])
    if number == 0:  # no template begins a prompt with nothing before it
        return _render_whole(chat, tokenizer.render(chat.messages, tools=chat.tools), tokenizer, wanted)
    check_ending(template, tokenizer.special_texts)
    prompt, answer = prompt_and_answer(template, chat, number)
    found = find_omissions(chat, prompt + answer, lambda marked: "".join(prompt_and_answer(template, marked, number)))
    told = judged(chat, found)
    says_nothing = not wanted.empty_answers and bool(unwritten_answers(chat, told))
    lacks_end = _lacks_end(answer, tokenizer)
    text = prompt + (answer if lacks_end else answer.rstrip())
    return Rendered(text, prompt=prompt, bos=False, eos=lacks_end, omissions=told, says_nothing=says_nothing)


def _up_to_last_trained(chat: Conversation) -> Conversation:
    """The conversation less the messages at its end on which no trained token depends."""
    if True not in chat.trained:
        raise ValueError("the conversation has no message of the assistant to learn")
    kept = len(chat.trained) - chat.trained[::-1].index(True)
    return replace(chat, messages=chat.messages[:kept], trained=chat.trained[:kept])


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair stands alone behind {text[: error.start][-20:]!r}") from None
