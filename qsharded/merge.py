"""``python -m qsharded.merge``: a checkpoint and an adapter in, one merged checkpoint out."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.merge", "; --output was not written")

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from qsharded.checkpoint.adapter import CARD_FILE, read_lora_config
from qsharded.checkpoint.files import write_bytes, write_json
from qsharded.checkpoint.merge_adapter import merge_weights
from qsharded.checkpoint.merging import Base, opened
from qsharded.checkpoint.source import INDEX, SafetensorsFolder, find_checkpoint
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.cli.base_model import base_model, find_adapter, log_base_note, mismatch_explained, tokenizer_folder
from qsharded.cli.check_rows import MOST_ROWS
from qsharded.cli.command import BLOCK_SIZE, errors_named
from qsharded.cli.hub import push_folder, writable_repository
from qsharded.cli.merged_logits import LogitsDiffer, Merged, compare
from qsharded.cli.output_folder import complete_or_absent, copy_files, refuse_occupied
from qsharded.config import check_values, option, parse
from qsharded.config.options import Check, hub_private, ignored_config_keys, push_to_hub
from qsharded.data import Tokenizer
from qsharded.data.template_options import TemplateOptions
from qsharded.data.tokenizer_files import present_files
from qsharded.distributed.world import World
from qsharded.models import ModelConfig
from qsharded.models.choice import read_config
from qsharded.models.config_spellings import ignoring
from qsharded.report.merged_card import MergedModel, merged_card
from qsharded.utils.durable_files import write_whole
from qsharded.utils.untrusted_json import read_json

_in = partial(option, group="What is merged")
_out = partial(option, group="What is written")

_SINGLE = World.single_process(torch.device("cpu"))

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge a LoRA adapter into its base model: a Hugging Face checkpoint that loads without PEFT.

    Files, names, shapes and dtypes are the base model's; the tokenizer is the adapter's if its folder has one. It works
    on the CPU, one file and one tensor at a time, so a model of any size fits.
    """

    prog: ClassVar[str] = "qsharded.merge"
    example: ClassVar[str] = "qsharded merge --adapter output/adapter --output merged"

    adapter: str = _in("PEFT adapter: a folder, or a Hub id.", metavar="PATH|ID")
    model: str = _in(
        "Hugging Face checkpoint in 16 or 32 bits: a folder, or a Hub id.",
        metavar="PATH|ID",
        unset="the base model that the adapter names",
    )
    revision: str | None = _in("Branch, tag or commit of a Hub id.", None, unset="the Hub's main branch")
    ignore_config_key: tuple[str, ...] = ignored_config_keys("What is merged")
    allow_other_base: bool = _in("Merge an adapter that records other base weights than those of --model.", False)
    base: Base = _in(
        "Weights to add the adapter to. 16bit: the checkpoint's own, which answer best in general and are what most "
        "people publish. nf4: those weights rounded to NF4 and back, which are the very ones that the adapter was "
        "trained on; the merged model then answers as the trained one does, but for the rounding of the sum to the "
        "checkpoint's dtype. fp4: the same, for adapters that were trained on a checkpoint packed in FP4.",
        "16bit",
    )
    block_size: int = _in(
        "Weights that shared an absmax when the adapter was trained, unless --base is 16bit.",
        64,
        unit="weights",
        check=BLOCK_SIZE,
    )
    output: str = _out("Folder to write to: a new or an empty one. It appears when it is complete.", metavar="PATH")
    format: Literal["safetensors", "gguf", "compressed-tensors"] = _out(
        "safetensors: a Hugging Face checkpoint. gguf: one file, model.gguf, for llama.cpp and what is built on it; "
        "needs the gguf package, and for a while up to twice the room. compressed-tensors: a checkpoint whose linear "
        "layers have 4 bits a weight (W4A16, rounded to nearest), for vLLM and transformers; needs the "
        "compressed-tensors package.",
        "safetensors",
    )
    gguf_type: Literal["auto", "f16", "q8_0", "q4_0"] = _out(
        "How --format gguf holds matrices: in 16 bits, or in blocks of 32 weights that share a scale, 8.5 or 4.5 bits "
        "a weight; auto is the checkpoint's own 16 or 32 bits. Norms stay in 32 bits; docs/gguf.md says what else.",
        "auto",
    )

    check_rows: int = _out(
        "Rows of text, of up to 64 tokens, on which the logits of what is written are compared with those of the base "
        "and the adapter beside it; both run on the CPU, a layer at a time. 0 compares nothing.",
        4,
        unit="rows",
        check=Check(f"from 0 to {MOST_ROWS}", lambda value: 0 <= value <= MOST_ROWS),
    )

    push_to_hub: str | None = push_to_hub("the merged model", "What is written")
    hub_private: bool = hub_private("What is written")

    def __post_init__(self) -> None:
        check_values(self)
        if self.gguf_type != "auto" and self.format != "gguf":
            raise ValueError(f"--gguf-type {self.gguf_type} is for --format gguf, got --format {self.format}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, MergeConfig, fill=base_model)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_named(config.prog, _SINGLE, (ValueError, OSError)), ignoring(config.ignore_config_key):
        run(config)


def run(config: MergeConfig) -> None:
    """Write the merged checkpoint, and upload it where that is asked for.

    Raises:
        ValueError: a mistake of the user's, named; logits that are not those of base and adapter.
    """
    output = Path(config.output).resolve()
    refuse_occupied(output)
    given = _found(config)
    repository = config.push_to_hub and writable_repository(config.push_to_hub, private=config.hub_private)
    with complete_or_absent(output) as unfinished:
        _merge(config, given, unfinished)
        merged = _converted(config, unfinished, output.name)
        measured = _compared(config, given, merged) if config.check_rows else ""
        write_whole(unfinished / CARD_FILE, _card(config, given.adapter, measured, repository).encode())
    logger.info("merged model written to %s", output)
    if repository and (address := push_folder(output, repository, "Merged with qsharded")):
        logger.info("merged model uploaded to %s", address)


@dataclass(frozen=True)
class _Given:
    """The folders that are read."""

    checkpoint: Path
    adapter: Path
    tokenizer: Path


def _found(config: MergeConfig) -> _Given:
    """What is to be merged, once it is known that it can be written as was asked."""
    from qsharded.integrations.merged_forms import check_form  # here, as all integrations are

    adapter = find_adapter(config.adapter)
    checkpoint = find_checkpoint(config.model, config.revision)
    allowed = {"allow_other": config.allow_other_base, "any_rounding": config.base == "16bit"}
    log_base_note(_SINGLE, adapter, config.model, checkpoint, **allowed)
    tokenizer = tokenizer_folder(checkpoint, adapter)
    check_form(config.format, checkpoint, tokenizer)
    return _Given(checkpoint, adapter, tokenizer)


def _merge(config: MergeConfig, given: _Given, folder: Path) -> None:
    """Write the merged checkpoint in 16 or 32 bits, with what belongs to it."""
    checkpoint = given.checkpoint
    with mismatch_explained(config.model, given.adapter):
        changed = merge_weights(checkpoint, given.adapter, folder, config.base, config.block_size)
    copied = [name for name in _files_beside(checkpoint) if name not in changed]
    copy_files([checkpoint / name for name in copied], checkpoint, folder)
    for name, content in changed.items():
        write_json(folder / name, content)
    copy_files(present_files(given.tokenizer), given.tokenizer, folder)
    kept = TemplateOptions.kept_in(given.adapter).over(TemplateOptions.kept_in(checkpoint))
    for name, content in kept.files().items():
        write_bytes(folder / name, [content])


def _files_beside(checkpoint: Path) -> list[str]:
    """What is copied beside the weights; not an index of other files than those that are read."""
    index = [] if SafetensorsFolder(checkpoint).index is None else [INDEX]
    return ["config.json", "generation_config.json", *index]


def _converted(config: MergeConfig, folder: Path, name: str) -> Merged:
    """What is written of the checkpoint in ``folder``, which is brought into the form that was asked for."""
    described, source = open_tied(folder, read_config(read_json(folder / "config.json")))
    if config.format == "safetensors":
        return Merged(described, source, is_exact=True)
    from qsharded.integrations.merged_forms import convert  # here, as all integrations are

    assert isinstance(described, ModelConfig)
    weights = convert(config.format, config.gguf_type, folder, name, described, source)
    return Merged(described, weights, is_exact=config.format == "gguf" and config.gguf_type in ("auto", "f16"))


def _compared(config: MergeConfig, given: _Given, merged: Merged) -> str:
    """How far the merged model is from base and adapter; "" where that was not measured. It is logged, or why not.

    Raises:
        LogitsDiffer: too far.
    """
    try:
        with opened(given.checkpoint, given.adapter, config.base, config.block_size) as merge:
            tokenizer = _read_tokenizer(given.tokenizer)
            found = compare(merge, read_lora_config(given.adapter), merged, tokenizer, config.check_rows)
    except LogitsDiffer:
        raise
    except (ValueError, MemoryError) as why:
        logger.info("merged logits were not compared with those of base and adapter: %s", why)
        return ""
    logger.info("merged logits, compared with those of base and adapter: %s", found)
    return str(found)


def _card(config: MergeConfig, adapter: Path, measured: str, repository: str | None) -> str:
    of_adapter = adapter / CARD_FILE
    text = of_adapter.read_text(encoding="utf-8", errors="replace") if of_adapter.is_file() else ""
    model = MergedModel(config.model, config.base, config.format, config.gguf_type, measured, text, repository)
    return merged_card(model)


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_folder(folder)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
