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

from qsharded.checkpoint.adapter import read_lora_config
from qsharded.checkpoint.files import write_bytes, write_json
from qsharded.checkpoint.merge_adapter import merge_weights
from qsharded.checkpoint.merging import Base, opened
from qsharded.checkpoint.source import INDEX, SafetensorsFolder, find_checkpoint
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.cli.base_model import base_model, find_adapter, log_base_note, mismatch_explained, tokenizer_folder
from qsharded.cli.check_rows import MOST_ROWS
from qsharded.cli.command import BLOCK_SIZE, errors_named
from qsharded.cli.merged_logits import LogitsDiffer, Merged, compare
from qsharded.cli.output_folder import complete_or_absent, copy_files, refuse_occupied
from qsharded.config import check_values, option, parse
from qsharded.config.options import Check, ignored_config_keys
from qsharded.data import Tokenizer
from qsharded.data.template_options import TemplateOptions
from qsharded.data.tokenizer_files import present_files
from qsharded.distributed.world import World
from qsharded.models import ModelConfig
from qsharded.models.choice import read_config
from qsharded.models.config_spellings import ignoring
from qsharded.utils.untrusted_json import read_json

_in = partial(option, group="What is merged")
_out = partial(option, group="What is written")

_SINGLE = World.single_process(torch.device("cpu"))
Format = Literal["safetensors", "gguf", "compressed-tensors"]
GgufType = Literal["auto", "f16", "q8_0", "q4_0"]  # gguf_tensors.py knows them too, and needs the optional package
GGUF_FILE = "model.gguf"

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
    format: Format = _out(
        "safetensors: a Hugging Face checkpoint. gguf: one file, model.gguf, for llama.cpp and what is built on it; "
        "needs the gguf package, and for a while up to twice the room. compressed-tensors: a checkpoint whose linear "
        "layers have 4 bits a weight (W4A16, rounded to nearest), for vLLM and transformers; needs the "
        "compressed-tensors package.",
        "safetensors",
    )
    gguf_type: GgufType = _out(
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
    """Write the merged checkpoint.

    Raises:
        ValueError: a mistake of the user's, named; logits that are not those of base and adapter.
    """
    output = Path(config.output).resolve()
    refuse_occupied(output)
    adapter = find_adapter(config.adapter)
    checkpoint = find_checkpoint(config.model, config.revision)
    allowed = {"allow_other": config.allow_other_base, "any_rounding": config.base == "16bit"}
    log_base_note(_SINGLE, adapter, config.model, checkpoint, **allowed)
    tokenizer = tokenizer_folder(checkpoint, adapter)
    _check_format(config.format, checkpoint, tokenizer)
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
        merged = _converted(config, unfinished, output.name)
        if config.check_rows:
            logger.info(_compared(config, checkpoint, adapter, tokenizer, merged))
    logger.info("merged model written to %s", output)


def _files_beside(checkpoint: Path) -> list[str]:
    """What is copied beside the weights; not an index of other files than those that are read."""
    index = [] if SafetensorsFolder(checkpoint).index is None else [INDEX]
    return ["config.json", "generation_config.json", *index]


def _check_format(form: Format, checkpoint: Path, tokenizer: Path) -> None:
    """Raise ValueError for a model that cannot be written so, or for want of a package."""
    if form == "safetensors":
        return
    if find_spec(form.replace("-", "_")) is None:
        raise ValueError(f"--format {form} needs a package that is not installed: pip install 'qsharded[{form}]'")
    if form == "gguf":
        from qsharded.integrations import gguf  # needs the optional package

        gguf.check_convertible(checkpoint, tokenizer)
    else:
        from qsharded.integrations import compressed_tensors  # needs the optional package

        compressed_tensors.check_convertible(checkpoint)


def _converted(config: MergeConfig, folder: Path, name: str) -> Merged:
    """What is written of the checkpoint in ``folder``, which is brought into the form that was asked for."""
    described, source = open_tied(folder, read_config(read_json(folder / "config.json")))
    if config.format == "safetensors":
        return Merged(described, source, is_exact=True)
    assert isinstance(described, ModelConfig)
    if config.format == "gguf":
        from qsharded.integrations.gguf_weights import gguf_weights  # needs the optional package

        _make_gguf(folder, name, config.gguf_type)
        is_exact = config.gguf_type in ("auto", "f16")
        return Merged(described, gguf_weights(folder / GGUF_FILE, described), is_exact)
    from qsharded.integrations.compressed_tensors import compressed_weights, pack_in_place  # needs the optional package

    pack_in_place(folder)
    return Merged(described, compressed_weights(folder, source), is_exact=False)


def _make_gguf(folder: Path, name: str, wanted: GgufType) -> None:
    """Put one file in the place of the checkpoint in ``folder``."""
    from qsharded.integrations.gguf import write_gguf  # needs the optional package

    parts = list(folder.iterdir())
    write_gguf(folder, folder / GGUF_FILE, name, wanted)
    for part in parts:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def _compared(config: MergeConfig, checkpoint: Path, adapter: Path, tokenizer: Path, merged: Merged) -> str:
    """How far the merged model is from base and adapter, or why that was not measured, in a line.

    Raises:
        LogitsDiffer: too far.
    """
    try:
        with opened(checkpoint, adapter, config.base, config.block_size) as merge:
            found = compare(merge, read_lora_config(adapter), merged, _read_tokenizer(tokenizer), config.check_rows)
    except LogitsDiffer:
        raise
    except (ValueError, MemoryError) as why:
        return f"merged logits were not compared with those of base and adapter: {why}"
    return f"merged logits, compared with those of base and adapter: {found}"


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_folder(folder)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
