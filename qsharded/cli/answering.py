"""What generating and chatting share: a model's options, the model with its adapter, and tokens as text."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.checkpoint.load import load_model
from qsharded.cli.base_model import trained_tokenizer
from qsharded.config import option
from qsharded.config.options import DATE, ignored_config_keys
from qsharded.data import Tokenizer
from qsharded.data.template_options import TemplateOptions
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.models.choice import ModelCode

logger = logging.getLogger(__name__)

_model = partial(option, group="Model")
_template = partial(option, group="Chat template")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model answers."""

    model: str = _model(
        "Hugging Face checkpoint: a folder, or a Hub id.",
        metavar="PATH|ID",
        unset="the base model that the adapter names, or the built-in one",
    )
    revision: str | None = _model("Branch, tag or commit of a Hub id.", None, unset="the Hub's main branch")
    adapter: str | None = _model(
        "PEFT adapter: a folder, or a Hub id.", None, metavar="PATH|ID", unset="none, the base model answers"
    )
    allow_other_base: bool = _model("Take an --adapter that records other base weights than those of --model.", False)
    ignore_config_key: tuple[str, ...] = ignored_config_keys("Model")
    dtype: Literal["auto", "bfloat16", "float32"] = _model(
        "Type of the activations and of the weights that stay out of NF4; auto is bfloat16 on GPUs, float32 on CPUs.",
        "auto",
    )
    model_code: ModelCode = _model("Whose code computes the model: as in qsharded.train.", "auto")

    chat_template: str | None = _template(
        "File with another chat template.", None, metavar="FILE", unset="the adapter's, or the model's"
    )
    chat_template_kwargs: dict[str, Any] = _template(
        "Variables for the chat template, as enable_thinking=false, beside those of the adapter's training.",
        {},
        metavar="NAME=VALUE ...",
    )
    template_date: str | None = _template(
        "Date for chat templates that write today's.",
        None,
        metavar="YYYY-MM-DD",
        check=DATE,
        unset="that of the adapter's training, or today",
    )


def read_tokenizer(config: ModelOptions, checkpoint: Path, adapter: Path | None) -> Tokenizer:
    """The tokenizer, and the chat template with its variables, that the adapter was trained with, or else the model's.
    What the options have otherwise is told in the log.

    Raises:
        ValueError: its files, or the other chat template, cannot be read.
    """
    given = TemplateOptions.given(config.chat_template, config.chat_template_kwargs, config.template_date)
    tokenizer = trained_tokenizer(checkpoint, adapter, given)
    if adapter and (note := tokenizer.template_difference(trained_tokenizer(checkpoint, adapter))):
        logger.info("note: %s", note)
    return tokenizer


def end_ids(tokenizer: Tokenizer, checkpoint: Path) -> set[int]:
    """What ends an answer. An adapter's tokenizer does not know of the model's generation_config.json."""
    has_its_own = (checkpoint / "tokenizer.json").is_file()
    return {*tokenizer.eos_ids, *(Tokenizer.from_folder(checkpoint).eos_ids if has_its_own else ())}


def load_with_adapter(
    checkpoint: Path, adapter: Path | None, dtype: torch.dtype, world: World, code: ModelCode = "auto"
) -> CausalLM:
    """The model, on every rank its part."""
    # Adapters in the activations' dtype: training casts its masters to it in every forward.
    lora = read_lora_config(adapter, dtype) if adapter else None
    model = load_model(checkpoint, mesh=world.mesh, lora=lora, dtype=dtype, device=world.device, model_code=code)
    if adapter:
        load_adapter(model, adapter)
    return model


def check_vocabulary(ids: Sequence[Sequence[int]], model: CausalLM, tokenizer: Tokenizer) -> None:
    """Raise ValueError where a token of ``ids`` is none of the model's."""
    largest = max(max(row, default=0) for row in ids)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives {tokenizer.decode([largest])!r} the id {largest}, but the model has "
            f"{model.config.vocab_size} tokens: it is another model's tokenizer"
        )


class TextStream:
    """Tokens in, text out, in whole characters: a character may take several tokens.

    A token's text depends on its neighbours (a space in front, bytes of one character), so each is decoded behind the
    last ones that gave text; special tokens give none.

    Args:
        tokenizer: whose tokens they are.
        before: the tokens in front of the first.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._behind, self._waiting = list(before), list[int]()

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        self._waiting.append(token)
        text = self._text_of_waiting()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._behind, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """The text of what is left, complete or not."""
        return self._text_of_waiting()

    def _text_of_waiting(self) -> str:
        known = self._tokenizer.decode(self._behind, skip_special_tokens=True)
        return self._tokenizer.decode(self._behind + self._waiting, skip_special_tokens=True)[len(known) :]
