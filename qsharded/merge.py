"""``python -m qsharded.merge``: a checkpoint and an adapter in, one merged checkpoint out."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.merge", "; --output was not written")

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import torch

from qsharded.checkpoint.files import write_bytes, write_json
from qsharded.checkpoint.merge_adapter import Base, merge_weights
from qsharded.checkpoint.source import INDEX, SafetensorsFolder, find_checkpoint
from qsharded.cli.base_model import base_model, find_adapter, log_base_note, mismatch_explained, tokenizer_folder
from qsharded.cli.command import BLOCK_SIZE, errors_named
from qsharded.cli.output_folder import complete_or_absent, copy_files, refuse_occupied
from qsharded.config import check_values, option, parse
from qsharded.config.options import ignored_config_keys
from qsharded.data.template_options import TemplateOptions
from qsharded.data.tokenizer_files import present_files
from qsharded.distributed.world import World
from qsharded.models.config_spellings import ignoring

_in = partial(option, group="What is merged")
_out = partial(option, group="What is written")

_SINGLE = World.single_process(torch.device("cpu"))
Format = Literal["safetensors", "gguf"]


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
    format: Format = _out(
        "safetensors: a Hugging Face checkpoint. gguf: one file, model.gguf, for llama.cpp and what is built on it, in "
        "the checkpoint's 16 or 32 bits; needs the gguf package, and for a while twice the room.",
        "safetensors",
    )

    def __post_init__(self) -> None:
        check_values(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, MergeConfig, fill=base_model)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_named(config.prog, _SINGLE, (ValueError, OSError)), ignoring(config.ignore_config_key):
        run(config)


def run(config: MergeConfig) -> None:
    """Write the merged checkpoint.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    output = Path(config.output).resolve()
    refuse_occupied(output)
    adapter = find_adapter(config.adapter)
    checkpoint = find_checkpoint(config.model, config.revision)
    allowed = {"allow_other": config.allow_other_base, "any_rounding": config.base == "16bit"}
    log_base_note(_SINGLE, adapter, config.model, checkpoint, **allowed)
    tokenizer = tokenizer_folder(checkpoint, adapter)
    if config.format == "gguf":
        _check_gguf(checkpoint, tokenizer)
    with complete_or_absent(output) as unfinished:
        with mismatch_explained(config.model, adapter):
            changed = merge_weights(checkpoint, adapter, unfinished, config.base, config.block_size)
        copied = [name for name in _files_beside(checkpoint) if name not in changed]
        copy_files([checkpoint / name for name in copied], checkpoint, unfinished)
        for name, content in changed.items():
            write_json(unfinished / name, content)
        copy_files(present_files(tokenizer), tokenizer, unfinished)
        for name, content in TemplateOptions.kept_in(adapter).over(TemplateOptions.kept_in(checkpoint)).files().items():
            write_bytes(unfinished / name, [content])
        if config.format == "gguf":
            _make_gguf(unfinished, output.name)
    logging.getLogger(__name__).info("merged model written to %s", output)


def _files_beside(checkpoint: Path) -> list[str]:
    """What is copied beside the weights; not an index of other files than those that are read."""
    index = [] if SafetensorsFolder(checkpoint).index is None else [INDEX]
    return ["config.json", "generation_config.json", *index]


def _check_gguf(checkpoint: Path, tokenizer: Path) -> None:
    if find_spec("gguf") is None:
        raise ValueError("--format gguf needs a package that is not installed: pip install 'qsharded[gguf]'")
    from qsharded.integrations.gguf import check_convertible  # needs the optional package

    check_convertible(checkpoint, tokenizer)


def _make_gguf(folder: Path, name: str) -> None:
    """Put one file in the place of the checkpoint in ``folder``."""
    from qsharded.integrations.gguf import write_gguf  # needs the optional package

    parts = list(folder.iterdir())
    write_gguf(folder, folder / "model.gguf", name)
    for part in parts:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


if __name__ == "__main__":
    main()
