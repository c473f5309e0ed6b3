"""``python -m qsharded.quantize``: a checkpoint in 16 or 32 bits in, one that is packed in 4 bits out."""

from qsharded.utils import signals

if __name__ == "__main__":
    signals.take_over("qsharded.quantize", "; --output was not written")

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from qsharded.checkpoint.base_identity import write_origin
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.packed_format import Form
from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.command import BLOCK_SIZE, errors_named
from qsharded.cli.output_folder import complete_or_absent, copy_files, refuse_occupied
from qsharded.config import check_values, option, parse
from qsharded.config.options import ignored_config_keys
from qsharded.data.tokenizer_files import present_files
from qsharded.distributed.world import World
from qsharded.models.config_spellings import ignoring
from qsharded.quant.formats import QuantFormat, QuantType

_in = partial(option, group="What is quantized")
_out = partial(option, group="What is written")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantize a checkpoint to 4 bits once, so that later runs read a quarter of the bytes and quantize nothing.

    Every linear layer but the head is packed, by default with the bytes that training and generating would make of it;
    all else keeps its type. It works on the GPU if there is one, a chunk of a tensor at a time, so a model of any size
    fits.
    """

    prog: ClassVar[str] = "qsharded.quantize"
    example: ClassVar[str] = "qsharded quantize --model meta-llama/Llama-3.1-8B-Instruct --output llama-8b-nf4"

    model: str = _in("Hugging Face checkpoint in 16 or 32 bits: a folder, or a Hub id.", metavar="PATH|ID")
    revision: str | None = _in("Branch, tag or commit of a Hub id.", None, unset="the Hub's main branch")
    ignore_config_key: tuple[str, ...] = ignored_config_keys("What is quantized")
    output: str = _out("Folder to write to: a new or an empty one. It appears when it is complete.", metavar="PATH")
    format: Form = _out(
        "Whose files. qsharded: ours. bitsandbytes: what transformers loads with it; qsharded reads them too.",
        "qsharded",
    )
    quant_type: QuantType = _out("The codebook of 16 values, as bitsandbytes calls it.", "nf4")
    block_size: int = _out(
        "Weights that share an absmax. Layers whose in_features is no multiple of it stay as they are. The fast "
        "kernels are for blocks of 64; PyTorch's own operations serve the others.",
        64,
        unit="weights",
        check=BLOCK_SIZE,
    )

    def __post_init__(self) -> None:
        check_values(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, QuantizeConfig)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World.single_process(device)
    with errors_named(config.prog, world, (ValueError, OSError)), ignoring(config.ignore_config_key):
        run(config, device)


def run(config: QuantizeConfig, device: torch.device) -> None:
    """Write the quantized checkpoint.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    output = Path(config.output).resolve()
    refuse_occupied(output)
    checkpoint = find_checkpoint(config.model, config.revision)
    with complete_or_absent(output) as unfinished:
        quant_format = QuantFormat(config.quant_type, config.block_size)
        quantize_checkpoint(checkpoint, unfinished, config.format, device, quant_format)
        write_origin(checkpoint, unfinished)
        others = [checkpoint / "generation_config.json", *present_files(checkpoint)]
        copy_files(others, checkpoint, unfinished)
    logging.getLogger(__name__).info("quantized model written to %s", output)


if __name__ == "__main__":
    main()
