"""``python -m qsharded.chat``: a conversation with a model in NF4, with or without an adapter."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.chat")

import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.answering import (
    ModelOptions,
    TextStream,
    check_vocabulary,
    end_ids,
    load_with_adapter,
    read_tokenizer,
)
from qsharded.cli.base_model import (
    base_or_builtin_model,
    find_adapter,
    log_base_note,
    mismatch_explained,
)
from qsharded.cli.command import compute_dtype, errors_named, join_world, run_as_process
from qsharded.config import check_values, option, parse
from qsharded.config.options import AT_LEAST_0, AT_LEAST_1, Check
from qsharded.data import Tokenizer
from qsharded.distributed.exact_all_gather import DamagedGather
from qsharded.distributed.self_test import check_gather
from qsharded.distributed.world import World, stop_world
from qsharded.lora.disabled import adapters_disabled
from qsharded.models import CausalLM
from qsharded.models.config_spellings import ignoring
from qsharded.models.generation import generate
from qsharded.training.rank_failures import one_cause
from qsharded.utils import collectives
from qsharded.utils.untrusted_json import read_json

_talk = partial(option, group="Conversation")
_sampling = partial(option, group="Answers")
_OWN_FILE = "generation_config.json's, or"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelOptions):
    """Talk with a model whose weights are kept in 4 bits (NF4), as they are in training; it knows the turns before.

    A line is a message. /system TEXT sets the system message and begins anew, /reset begins anew, /adapter off and
    /adapter on answer without and with the adapter, /save FILE writes the conversation as a row to train on, /quit or
    the end of the input leaves. A model that one GPU cannot hold is sharded: torchrun --standalone --nproc-per-node N
    -m qsharded.chat. Without --model and --adapter the built-in model answers.
    """

    prog: ClassVar[str] = "qsharded.chat"
    example: ClassVar[str] = "qsharded chat --adapter output/adapter"

    system: str | None = _talk("System message to begin with.", None, unset="none, or the chat template's own")
    max_new_tokens: int = _sampling("Longest answer.", 512, unit="tokens", check=AT_LEAST_1)
    temperature: float | None = _sampling(
        "0 takes the likeliest token each time; above, tokens are drawn, the more evenly the higher.",
        None,
        check=AT_LEAST_0,
        unset=f"{_OWN_FILE} 0",
    )
    top_k: int | None = _sampling(
        "Draw from this many of the likeliest tokens; 0 is all.", None, check=AT_LEAST_0, unset=f"{_OWN_FILE} 0"
    )
    top_p: float | None = _sampling(
        "Draw from the likeliest tokens that together reach this probability.",
        None,
        check=Check("above 0 and at most 1", lambda value: 0 < value <= 1),
        unset=f"{_OWN_FILE} 1",
    )
    seed: int = _sampling("Seed of the drawing; each answer has the next one.", 0, check=AT_LEAST_0)

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as ``models.generation.generate`` takes it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, config: ChatConfig, checkpoint: Path) -> "Sampling":
        """The options', and where they say nothing the model's own, if it is made to be drawn from."""
        file = checkpoint / "generation_config.json"
        said: dict[str, Any] = read_json(file) if file.is_file() else {}
        own = said if said.get("do_sample") else {}
        found = {"temperature": own.get("temperature", 1.0 if own else 0.0)}
        found |= {name: own[name] for name in ("top_k", "top_p") if own.get(name) is not None}
        options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
        return cls(**(found | {name: value for name, value in options.items() if value is not None}))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, ChatConfig, fill=base_or_builtin_model)
    world = join_world(config.prog)
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    with one_cause(config.prog, world), errors_named(config.prog, world, (ValueError, OSError, DamagedGather)):
        check_gather(world)
        with ignoring(config.ignore_config_key):
            chat = _opened(config, world)
        while chat.turn(_line(world)):
            pass
    stop_world(world)


def _opened(config: ChatConfig, world: World) -> "Chat":
    checkpoint = world.first_on_node(lambda: find_checkpoint(config.model, config.revision))
    adapter = world.first_on_node(partial(find_adapter, config.adapter)) if config.adapter else None
    if adapter:
        log_base_note(world, adapter, config.model, checkpoint, allow_other=config.allow_other_base)
    tokenizer = read_tokenizer(config, checkpoint, adapter)
    if not tokenizer.has_chat_template:
        raise ValueError(f"{config.model} has no chat template: qsharded generate --raw continues plain text")
    with mismatch_explained(config.model, adapter):
        dtype = compute_dtype(config.dtype, world.device)
        model = load_with_adapter(checkpoint, adapter, dtype, world, config.model_code)
    ends = end_ids(tokenizer, checkpoint)
    say: Callable[[str], object] = partial(print, end="", flush=True) if world.is_main else lambda _: None
    say("/system TEXT, /reset, /adapter off|on, /save FILE, /quit\n")
    return Chat(config, model, tokenizer, ends, Sampling.of(config, checkpoint), say, world.is_main, config.system)


def _line(world: World) -> str | None:
    """The next line, on every rank: the main rank reads the keyboard. None at the end of the input."""
    line: str | None = None
    if world.is_main:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline() or None
    line = collectives.broadcast_object(line, world.long_timeout_group)
    return None if line is None else line.strip()


@dataclass
class Chat:
    """A conversation. Every rank has one, and all take the same turns; ``say`` prints on the main rank."""

    config: ChatConfig
    model: CausalLM
    tokenizer: Tokenizer
    ends: set[int]
    sampling: Sampling
    say: Callable[[str], object]
    is_main: bool = True
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    with_adapter: bool = True
    answers: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """All so far, the system message in front."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    def turn(self, line: str | None) -> bool:
        """Answer a message, or do what a command says; False where it ends the conversation."""
        if line is None or line == "/quit":
            return False
        if line.startswith("/"):
            self._command(*line[1:].split(maxsplit=1))
        elif line:
            self._answer(line)
        return True

    def _command(self, name: str = "", rest: str = "") -> None:
        commands = {"system": self._set_system, "reset": self._reset, "adapter": self._switch, "save": self._save}
        if name not in commands:
            self.say(f"there is no /{name}; /system TEXT, /reset, /adapter off|on, /save FILE and /quit are\n")
            return
        commands[name](rest)

    def _tell(self, line: str) -> None:
        self.say(line)

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._reset("")

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self.say("(a new conversation)\n")

    def _switch(self, to: str) -> None:
        if self.config.adapter is None:
            return self._tell("there is no adapter: --adapter gives one\n")
        if to not in ("on", "off"):
            return self._tell(f"/adapter takes on or off, got {to!r}\n")
        try:
            with adapters_disabled(self.model):
                self.with_adapter = to == "on"
        except ValueError as error:
            return self._tell(f"{error}\n")
        self.say(f"(the adapter is {to}; the conversation goes on)\n")

    def _save(self, path: str) -> None:
        if not path:
            return self._tell("/save takes a file to add the conversation to, as a row\n")
        try:
            if self.is_main:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return self._tell(f"{error}\n")
        self.say(f"(added to {path})\n")

    def _answer(self, text: str) -> None:
        """Print the answer while it is written, and keep it."""
        self.turns.append({"role": "user", "content": text})
        prompt = self.tokenizer.encode(self.tokenizer.render(self.messages, add_generation_prompt=True))
        check_vocabulary([prompt], self.model, self.tokenizer)
        room = self.model.config.max_position_embeddings - len(prompt)
        if room < 1:
            self.turns.pop()
            return self._tell("the conversation is longer than the model can read: /reset begins anew\n")
        answer = self._generated(prompt, min(room, self.config.max_new_tokens))
        self.turns.append({"role": "assistant", "content": answer})

    def _generated(self, prompt: list[int], limit: int) -> str:
        stream, parts = TextStream(self.tokenizer, prompt), list[str]()

        def take(_: int, token: int) -> None:
            parts.append(stream.add(token))
            self.say(parts[-1])

        with nullcontext() if self.with_adapter else adapters_disabled(self.model):
            tokens = generate(
                self.model,
                [prompt],
                max_new_tokens=limit,
                eos_ids=self.ends,
                seed=self.config.seed + self.answers,
                on_token=take,
                graphs=True,
                **vars(self.sampling),
            )
        self.answers += 1
        parts.append(stream.rest())
        self.say(parts[-1] + "\n")
        if len(tokens[0]) == limit:
            self.say(f"(cut at {limit} tokens)\n")
        return "".join(parts)


if __name__ == "__main__":
    run_as_process(main)
