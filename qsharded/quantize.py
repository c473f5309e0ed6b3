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
from typing import ClassVar, Literal

import torch

from qsharded.calibration.checkpoint import Calibrated, calibrate_checkpoint, write_packed
from qsharded.calibration.method import Calibration
from qsharded.calibration.rows import read_calibration_rows
from qsharded.checkpoint.pack import read_unpacked
from qsharded.checkpoint.packed_format import Form
from qsharded.checkpoint.source import find_checkpoint
from qsharded.cli.command import BLOCK_SIZE, compute_dtype, errors_named, join_world, run_as_process
from qsharded.cli.output_folder import complete_or_absent, refuse_occupied
from qsharded.config import check_values, option, parse
from qsharded.config.bad_rows import bad_rows_option, skipped_bad_rows
from qsharded.config.options import AT_LEAST_1, AT_LEAST_2, ignored_config_keys
from qsharded.data import Tokenizer
from qsharded.distributed.world import World, stop_world
from qsharded.models.choice import read_config
from qsharded.models.config_spellings import ignoring
from qsharded.quant.formats import QuantFormat, QuantType

_in = partial(option, group="What is quantized")
_calibrated = partial(option, group="What it is calibrated on")
_out = partial(option, group="What is written")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantize a checkpoint to 4 bits once, so that later runs read a quarter of the bytes and quantize nothing.

    Every linear layer but the head is packed, by default with the bytes that training and generating would make of it;
    all else keeps its type. It works on the GPU if there is one, a chunk of a tensor at a time, so a model of any size
    fits.

    With --calibrate the codes and scales are chosen for the inputs that the layers get on your rows, in as many bytes:
    a base that is about three times closer to the original (docs/calibration.md). One decoder layer in 16 bits is in
    memory then, on one GPU or on each of several: `torchrun --standalone --nproc-per-node N -m qsharded.quantize`. A
    run that is stopped goes on behind its last layer when it is started again.
    """

    prog: ClassVar[str] = "qsharded.quantize"
    example: ClassVar[str] = "qsharded quantize --model meta-llama/Llama-3.1-8B-Instruct --output llama-8b-nf4"

    model: str = _in("Hugging Face checkpoint in 16 or 32 bits: a folder, or a Hub id.", metavar="PATH|ID")
    revision: str | None = _in("Branch, tag or commit of a Hub id.", None, unset="the Hub's main branch")
    ignore_config_key: tuple[str, ...] = ignored_config_keys("What is quantized")
    calibrate: list[str] = _calibrated(
        "Rows to choose codes and scales for, from sources that the trainer's --dataset takes, with the chat template; "
        "of several in equal parts. Mixed ones serve best, of all that the model is to be good at.",
        [],
        metavar="PATH|ID",
    )
    calibrate_rows: int = _calibrated("How many, of all sources together.", 32, unit="rows", check=AT_LEAST_1)
    calibrate_length: int = _calibrated(
        "Tokens in each: rows of a source are put behind each other and cut.", 1024, unit="tokens", check=AT_LEAST_2
    )
    bad_rows: str = bad_rows_option("What it is calibrated on")
    method: Literal["compensated", "search", "nearest"] | None = _calibrated(
        "compensated: each column's rounding error is made up for by the columns after it. search: scales alone are "
        "chosen. nearest: as bitsandbytes rounds, without rows.",
        None,
        unset="compensated with --calibrate, nearest without",
    )
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
        skipped_bad_rows(self.bad_rows)
        if self.calibrate and self.method == "nearest":
            raise ValueError("--method nearest takes no --calibrate: leave one of them out")
        if not self.calibrate and self.method in ("compensated", "search"):
            raise ValueError(f"--method {self.method} needs rows: give --calibrate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments."""
    config = parse(sys.argv[1:] if argv is None else argv, QuantizeConfig)
    world = join_world(config.prog)
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    with errors_named(config.prog, world, (ValueError, OSError)), ignoring(config.ignore_config_key):
        run(config, world)
    stop_world(world)


def run(config: QuantizeConfig, world: World) -> None:
    """Write the quantized checkpoint. All ranks calibrate; the main one writes.

    Raises:
        ValueError: a mistake of the user's, named.
    """
    output = Path(config.output).resolve()
    refuse_occupied(output)
    checkpoint = world.first_on_node(lambda: find_checkpoint(config.model, config.revision))
    quant_format = QuantFormat(config.quant_type, config.block_size)
    calibrated = _calibrate(config, checkpoint, output, quant_format, world) if config.calibrate else None
    if world.is_main:
        _write(config, checkpoint, output, quant_format, world.device, calibrated)
    world.barrier()


def _calibrate(
    config: QuantizeConfig, checkpoint: Path, output: Path, quant_format: QuantFormat, world: World
) -> Calibrated:
    tokenizer = Tokenizer.from_folder(checkpoint)
    vocab_size = read_config(read_unpacked(checkpoint)).vocab_size
    wanted = config.calibrate_rows, config.calibrate_length
    skip = skipped_bad_rows(config.bad_rows)
    rows = read_calibration_rows(config.calibrate, tokenizer, *wanted, vocab_size, skip_bad_rows=skip)
    how = Calibration("search" if config.method == "search" else "compensated", quant_format, world.group)
    unfinished = output.with_name(f".{output.name}.calibration")
    dtype = compute_dtype("auto", world.device)
    return calibrate_checkpoint(checkpoint, rows, how, unfinished, world.device, dtype)


def _write(
    config: QuantizeConfig,
    checkpoint: Path,
    output: Path,
    quant_format: QuantFormat,
    device: torch.device,
    calibrated: Calibrated | None,
) -> None:
    with complete_or_absent(output) as unfinished:
        write_packed(checkpoint, unfinished, config.format, device, quant_format, calibrated)
    if calibrated:
        calibrated.store.remove()
    logging.getLogger(__name__).info("quantized model written to %s", output)


if __name__ == "__main__":
    run_as_process(main)
