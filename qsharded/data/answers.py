"""An answer as generation gives it: the prompt that the model sees, and the text that it is to write.

A template may render a turn otherwise once the conversation goes on, leave its reasoning out even where it does not
(DeepSeek-R1's distillations), or move tools and system message about (Mistral). Here the prompt is what generation
renders, and the answer is the turn as the template writes a last one; reasoning that it leaves out is put back.
"""

import re

from qsharded.data.chat import ChatTemplate
from qsharded.data.formats import Conversation
from qsharded.data.messages import REASONING_KEYS, Message

_OPEN, _CLOSE = "<think>", "</think>"
_EMPTY_BLOCK = re.compile(rf"{_OPEN}(\s*){_CLOSE}")
_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]


def prompt_and_answer(template: ChatTemplate, chat: Conversation, number: int) -> tuple[str, str]:
    """(prompt, answer) of message ``number``, the answer up to the last of the turn's end.

    Marks by ``{% generation %}`` are not needed, and not read: all of the answer is to be trained on.

    Raises:
        ValueError: the template refuses the messages up to there, or shows no turn that could follow its prompt.
    """
    return _Answer(template, chat, number).texts()


class _Answer:
    def __init__(self, template: ChatTemplate, chat: Conversation, number: int) -> None:
        self._template = template
        self._tools = chat.tools
        self._before, self._message = chat.messages[:number], chat.messages[number]
        self._number = number
        self._prompt = self._render(self._before, prompt=True)

    def texts(self) -> tuple[str, str]:
        """The turn as the template writes it, if that follows the prompt and has all; else with its reasoning put in
        front."""
        body, gap, said = _parted(self._message)
        bare, follows = self._turn(said)
        if body is None and follows:
            return self._prompt, bare
        for message in self._with_reasoning(body, gap, said, bare):
            turn, follows = self._turn(message)
            if follows and turn.split() != bare.split():  # white space alone is what the reasoning left behind
                return self._prompt, turn
        if body and (empty := _EMPTY_BLOCK.match(bare)):  # Kimi K2 never fills the block that it writes
            filled = body if empty[1] else body.strip()
            return self._prompt, _OPEN + filled + _CLOSE + bare[empty.end() :]
        lead = _opened(self._prompt)
        begun = _OPEN if lead is None else ""
        return self._prompt, begun + (body or "\n\n").removeprefix(lead or "") + _CLOSE + gap + bare.lstrip()

    def _with_reasoning(self, body: str | None, gap: str, said: Message, bare: str) -> list[Message]:
        """Forms of the message of which the template may write the reasoning."""
        if body is None:
            return []
        content = said.get("content") or ""
        if _EMPTY_BLOCK.match(bare) or (not content and "tool_calls" in said):
            return [self._message]
        return [self._message, said | {"content": f"{_OPEN}{body}{_CLOSE}{gap}{content}"}]

    def _turn(self, message: Message) -> tuple[str, bool]:
        """The turn, and whether it goes on from the prompt's end: not where that opens a think block of its own."""
        whole = self._render([*self._before, message])
        if whole.startswith(self._prompt):
            return whole[len(self._prompt) :], True
        # The messages before it read otherwise too; behind the simplest question the turn is the same.
        prompt = self._render(_QUESTION, prompt=True)
        whole = self._render([*_QUESTION, message])
        if whole.startswith(prompt):
            return whole[len(prompt) :], True
        header = prompt.rpartition(_OPEN)[0]
        if _opened(prompt) is not None and whole.startswith(header):
            return whole[len(header) :], _opened(self._prompt) is None
        if (turn := _behind(prompt, whole)) is not None:
            return turn, True
        raise ValueError(
            f"the chat template's prompt for the assistant's message {self._number} is no beginning of what it writes "
            "with the answer; put another chat_template.jinja into the model's folder, or leave the row out"
        )

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        return self._template.render(messages, add_generation_prompt=prompt, tools=self._tools)


def _behind(prompt: str, whole: str) -> str | None:
    """``whole`` behind ``prompt``, if it begins with that but for white space."""
    pattern = r"\s*".join(map(re.escape, "".join(prompt.split())))
    found = re.match(rf"\s*{pattern}\s*", whole)
    return whole[found.end() :] if found else None


def _opened(prompt: str) -> str | None:
    """The white space behind the think block that ``prompt`` opens at its end, None if it opens none."""
    _, opened, lead = prompt.rpartition(_OPEN)
    return lead if opened and not lead.strip() else None


def _parted(message: Message) -> tuple[str | None, str, Message]:
    """(what stands between the tags of a think block or None, the space behind it, the message without its reasoning).

    Reasoning in the content stays as it is written there.
    """
    key = next((key for key in REASONING_KEYS if message.get(key)), None)
    if key:
        said = {name: value for name, value in message.items() if name not in REASONING_KEYS}
        return "\n" + message[key].strip("\n") + "\n", "\n\n", said
    head, closed, tail = (message.get("content") or "").rpartition(_CLOSE)
    if not closed:
        return None, "\n\n", message
    content = tail.lstrip()
    gap = tail[: len(tail) - len(content)] if content else "\n\n"
    tagged = head.lstrip().startswith(_OPEN)
    body = head.lstrip().removeprefix(_OPEN) if tagged else "\n" + head
    return body, gap, message | {"content": content}
