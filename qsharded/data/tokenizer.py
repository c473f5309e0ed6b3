"""A Hugging Face tokenizer folder at work: text to ids, ids to text, and conversations to text."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qsharded.data.chat import ChatTemplate, Span
from qsharded.data.content import content_hash
from qsharded.data.encoded import Encoded, Encoder
from qsharded.data.formats import Conversation
from qsharded.data.messages import Message
from qsharded.data.omissions import Omission
from qsharded.data.template_options import TemplateOptions
from qsharded.data.tokenizer_files import (
    EOS_TOKEN_ID,
    load_backend,
    optional_json,
    present_files,
    read_settings,
    read_templates,
    special_variables,
)
from qsharded.data.trained_spans import assistant_spans
from qsharded.data.turn_ends import with_turn_ends
from qsharded.utils.durable_files import copy_whole, write_whole
from qsharded.utils.untrusted_json import check


class Tokenizer:
    """Text to ids and back; made by :meth:`from_folder`.

    Attributes:
        bos_id: the id that begins a document, or None.
        eos_id: the id that ends a document.
        pad_id: the id for padding, on which no result depends; ``eos_id`` where the folder names none.
        adds_bos: whether a document begins with ``bos_id``; in a chat that is the template's business.
    """

    def __init__(self, folder: Path, template: TemplateOptions | None = None) -> None:
        self._folder = folder
        self._template = (template or TemplateOptions()).over(TemplateOptions.kept_in(folder))
        self._settings = read_settings(folder)
        self._variables = special_variables(self._settings)
        self._backend = load_backend(folder, self._settings)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._find_eos()
        pad_id = self._id_of("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.adds_bos = self._find_adds_bos()
        # Offsets must be the tokens' own: a ByteLevel post-processor may cut the spaces out of them.
        self._backend.post_processor = None
        self._encoder = Encoder(self._backend)

    @classmethod
    def from_folder(cls, path: str | Path, template: TemplateOptions | None = None) -> "Tokenizer":
        """The tokenizer of a checkpoint folder; ``template``: what is otherwise than there about the chat template.

        Raises:
            ValueError: tokenizer.json is missing or unreadable, a JSON file is malformed, no end-of-sequence token is
                named, or the other chat template cannot be read.
        """
        return cls(Path(path), template)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, no beginning or end added; special tokens written in it are recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` as a document begins: with BOS, once, where the tokenizer adds one."""
        if not self.adds_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def encode_all(self, texts: Sequence[str]) -> list[Encoded]:
        """As :meth:`encode`, of many texts, on all cores; with the place of each id in its text."""
        return self._encoder.all(texts)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of ``text`` in mid-text: without the space that some tokenizers put before all they are given."""
        for before in ("\n", "|"):  # the first that keeps its own ids, not merging with the text
            alone, joint = self.encode(before), self.encode(before + text)
            if joint[: len(alone)] == alone:
                return joint[len(alone) :]
        return self.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: what a model's embedding must have room for."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def longest_token(self) -> int:
        """Characters, or bytes, of the token that stands for most."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends generation: the tokenizer's, the model's own, and what ends an assistant's turn."""
        named = [self.eos_id, *self._model_eos_ids(), self._turn_end()]
        return tuple(dict.fromkeys(token for token in named if token is not None))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of all special tokens."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def _eos_texts(self) -> tuple[str, ...]:
        """Of the ids that end generation whatever the template says."""
        texts = (self._backend.id_to_token(token) for token in (self.eos_id, *self._model_eos_ids()))
        return tuple(text for text in texts if text)

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`render` can be used."""
        return "default" in self._templates

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as the chat template writes it. BOS, if the template has one, is part of the text.

        Args:
            messages: objects with ``role`` and ``content``.
            add_generation_prompt: end with the assistant's header, for the model to go on.
            tools: descriptions for templates that take them.

        Raises:
            ValueError: no chat template, or it refuses the conversation.
        """
        return self.template_for(tools).render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def assistant_spans(
        self, chat: Conversation, text: str, *, train_on_turn_ends: bool = True
    ) -> tuple[list[Span], list[Omission]]:
        """([start, end) in characters of the trained turns in ``text``, the rendering of ``chat``; what is to be told
        of their ends).

        Args:
            train_on_turn_ends: take in the end of a turn that follows what the template marks.

        Raises:
            ValueError: they cannot be told from the rest for certain.
        """
        template = self.template_for(chat.tools)
        spans = assistant_spans(template, chat, text, self.special_texts)
        return with_turn_ends(template, text, spans, self.special_texts, self._eos_texts, learn=train_on_turn_ends)

    def template_for(self, tools: list[Any] | None) -> ChatTemplate:
        """The chat template for a conversation with such tools; some checkpoints have one of its own for that.

        Raises:
            ValueError: there is none.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(
                f"the tokenizer in {self._folder} has no {name} chat template. Take the instruction-tuned version of "
                "the model, put a chat_template.jinja into the folder, or give plain rows: prompt + completion, or text"
            )
        return self._templates[name]

    @property
    def writes_today(self) -> bool:
        """Whether a chat template writes today's date, so that it writes other text tomorrow."""
        return any(template.writes_today for template in self._templates.values())

    @property
    def files(self) -> list[Path]:
        """The folder's files that make up the tokenizer, for a copy beside an adapter; some may be in a sub-folder.
        A chat template from elsewhere stands in the place of the folder's own."""
        present = present_files(self._folder)
        if self._template.file is None:
            return present
        return [path for path in present if path.suffix != ".jinja"] + [self._template.file]

    def identity(self) -> dict[str, Any]:
        """Values of JSON that differ between tokenizers that may give a row other ids or another loss mask."""
        return {
            "files": {path.name: content_hash(path) for path in self.files},
            "templates": self.template_identity(),
            "eos": self.eos_ids,
        }

    def template_identity(self) -> dict[str, Any]:
        """Values of JSON that differ between tokenizers that may write a conversation otherwise."""
        return {name: template.identity for name, template in self._templates.items()}

    def copy_files(self, folder: Path) -> None:
        """Put copies of :attr:`files` into ``folder``, laid out as they are here."""
        for file in self.files:
            if file != self._template.file:
                copy_whole(file, folder / file.relative_to(self._folder))
        for name, content in self.template_files.items():
            write_whole(folder / name, content)

    @cached_property
    def template_files(self) -> dict[str, bytes]:
        """Name -> content of the files that say what is otherwise about the chat template than the folder has it."""
        return self._template.files()

    def template_difference(self, trained: "Tokenizer") -> str | None:
        """A sentence on how chats are written otherwise than ``trained``, the tokenizer of an adapter, writes them."""
        theirs, ours = trained.template_identity(), self.template_identity()
        if theirs == ours:
            return None
        options = [str(tokenizer._template) for tokenizer in (trained, self)]
        if options[0] != options[1]:
            return (
                f"the adapter was trained with other variables of the chat template: {options[0]}; here: {options[1]}"
            )
        return "the adapter was trained with another chat template than the one here"

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        sources = self._template.sources() or read_templates(self._folder, self._settings)
        variables = {**self._variables, **self._template.variables}
        return {name: ChatTemplate(source, variables, self._template.today) for name, source in sources.items()}

    def _id_of(self, variable: str) -> int | None:
        text = self._variables.get(variable)
        return None if text is None else self._backend.token_to_id(text)

    def _find_eos(self) -> int:
        named = [self._id_of("eos_token"), *self._model_eos_ids()]
        found = next((token for token in named if token is not None), None)
        if found is None:
            raise ValueError(f"{self._folder} names no eos_token that its tokenizer.json knows; training needs one")
        return found

    def _model_eos_ids(self) -> list[int]:
        """Of generation_config.json, or else of config.json."""
        for name in ("generation_config.json", "config.json"):
            said = optional_json(self._folder / name)
            check(said, EOS_TOKEN_ID, str(self._folder / name))
            ids = said.get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
        return []

    def _turn_end(self) -> int | None:
        """The special token that ends an assistant's turn in the chat template."""
        chat = Conversation([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], [False, True])
        try:
            text = self.render(chat.messages)
            spans, _ = self.assistant_spans(chat, text)
            start, end = spans[-1]
        except (ValueError, IndexError):  # no template, or one that needs other messages
            return None
        endings = [token for token in self.special_texts if text[start:end].rstrip().endswith(token)]
        return self._backend.token_to_id(max(endings, key=len)) if endings else None

    def _find_adds_bos(self) -> bool:
        if self.bos_id is None:
            return False
        # The entry cannot say no: transformers 5 follows tokenizer.json's post-processor where there is one.
        return self._settings.get("add_bos_token") is True or self._backend.encode("").ids[:1] == [self.bos_id]
