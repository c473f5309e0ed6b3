"""``python -m qsharded.generate``: a model in NF4, with or without an adapter, answers prompts."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.generate")

import logging
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

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
from qsharded.models import CausalLM
from qsharded.models.config_spellings import ignoring
from qsharded.models.generation import generate
from qsharded.training.rank_failures import one_cause
from qsharded.utils import collectives

logger = logging.getLogger(__name__)

_prompt = partial(option, group="Prompts")
_sampling = partial(option, group="Answers")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelOptions):
    """Answer prompts with a model whose weights are kept in 4 bits (NF4), as they are in training.

    Answers appear as they are written; on one GPU their steps are replayed from CUDA graphs. A model that one GPU
    cannot hold is sharded: call it as `torchrun --standalone --nproc-per-node N -m qsharded.generate`. Without --model
    and --adapter the built-in model answers.
    """

    prog: ClassVar[str] = "qsharded.generate"
    example: ClassVar[str] = 'qsharded generate --adapter output/adapter --prompt "Spell cat backwards"'

    prompt: tuple[str, ...] = _prompt(
        "What to answer, as the user of a chat; - reads it from standard input. Given several times, each is answered "
        "by itself."
    )
    system: str | None = _prompt("System message in front of each prompt.", None, unset="none")
    raw: bool = _prompt(
        "Continue the prompt as plain text, without the chat template; so it is where the tokenizer has none.", False
    )

    max_new_tokens: int = _sampling("Longest answer.", 512, unit="tokens", check=AT_LEAST_1)
    temperature: float = _sampling(
        "0 takes the likeliest token each time; above, tokens are drawn, the more evenly the higher.",
        0.0,
        check=AT_LEAST_0,
    )
    top_k: int = _sampling("Draw from this many of the likeliest tokens; 0 is all.", 0, check=AT_LEAST_0)
    top_p: float = _sampling(
        "Draw from the likeliest tokens that together reach this probability.",
        1.0,
        check=Check("above 0 and at most 1", lambda value: 0 < value <= 1),
    )
    seed: int = _sampling("Seed of the drawing, the same for each prompt.", 0, check=AT_LEAST_0)

    def __post_init__(self) -> None:
        check_values(self)
        if not self.prompt:
            raise ValueError("--prompt must be given at least once")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ValueError("--top-k and --top-p choose among drawn tokens: give a --temperature above 0 with them")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, GenerateConfig, fill=base_or_builtin_model)
    world = join_world(config.prog)
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    with one_cause(config.prog, world), errors_named(config.prog, world, (ValueError, OSError, DamagedGather)):
        check_gather(world)
        with ignoring(config.ignore_config_key):
            run(config, world)
    stop_world(world)


def run(config: GenerateConfig, world: World) -> None:
    """Answer every prompt; the main rank prints.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    prompts = _read_prompts(config.prompt, world)
    checkpoint = world.first_on_node(lambda: find_checkpoint(config.model, config.revision))
    adapter = world.first_on_node(partial(find_adapter, config.adapter)) if config.adapter else None
    if adapter:
        log_base_note(world, adapter, config.model, checkpoint, allow_other=config.allow_other_base)
    tokenizer = read_tokenizer(config, checkpoint, adapter)
    eos_ids = end_ids(tokenizer, checkpoint)
    ids = [_encode(tokenizer, prompt, config) for prompt in prompts]
    with mismatch_explained(config.model, adapter):
        dtype = compute_dtype(config.dtype, world.device)
        model = load_with_adapter(checkpoint, adapter, dtype, world, config.model_code)
    check_vocabulary(ids, model, tokenizer)
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        if len(prompts) > 1 and world.is_main:
            print("> " + textwrap.shorten(prompt, 78, placeholder=" ..."))
        _answer(config, model, tokenizer, prompt_ids, eos_ids, shown=world.is_main)


def _read_prompts(prompts: Sequence[str], world: World) -> list[str]:
    read = [_standard_input(world) if prompt == "-" else prompt for prompt in prompts]
    for number, prompt in enumerate(read, start=1):
        if not prompt.strip():
            raise ValueError(f"--prompt {number} of {len(read)} is empty")
    return read


def _standard_input(world: World) -> str:
    """Its text, on every rank: they share one input, so the main rank reads."""
    text = sys.stdin.read() if world.is_main else ""
    return collectives.broadcast_object(text, world.long_timeout_group).removesuffix("\n")


def _encode(tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> list[int]:
    if not config.raw and tokenizer.has_chat_template:
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    if config.system is not None:
        raise ValueError("--system is a message of a chat, and this is plain text: put it into --prompt")
    return tokenizer.with_bos(tokenizer.encode(prompt))


def _answer(
    config: GenerateConfig,
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: list[int],
    eos_ids: Collection[int],
    *,
    shown: bool,
) -> None:
    """Print the answer while it is written. Every rank calls this."""
    text = TextStream(tokenizer, prompt)
    tokens = generate(
        model,
        [prompt],
        max_new_tokens=config.max_new_tokens,
        eos_ids=eos_ids,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        graphs=True,
        on_token=(lambda _, token: print(text.add(token), end="", flush=True)) if shown else None,
    )
    if shown:
        print(text.rest())
    if len(tokens[0]) == config.max_new_tokens:
        logger.info("(cut at --max-new-tokens %d)", config.max_new_tokens)


if __name__ == "__main__":
    run_as_process(main)
