"""Calibrated bases: how close to the original on a small real model, and how long they take at the size of large ones.

    python -m benchmarks.calibration quality --model SMOLLM2_FOLDER --prose TEXT_FILE
    python -m benchmarks.calibration finetune --model SMOLLM2_FOLDER --calibration-text FILE Python --text C++ Markdown
    python -m benchmarks.calibration speed --shape 8b --layers 3
    python -m benchmarks.calibration speed --shape 30b-a3b --layers 2
    torchrun --standalone --nproc-per-node 2 -m benchmarks.calibration speed --shape 70b --layers 5

quality: two CPU cores take half an hour. Calibration is on prose and Python; measured are other parts of these, and C++
headers and Markdown pages, which calibration never sees.
finetune: LoRA on such bases, on texts unlike those of the calibration; --folder keeps bases and runs, and the same
command goes on with them.
speed: random weights; so many layers are measured, and the time of the model is multiplied from them; on a GPU the
kernel is held against its reference too. The exit status is 1 where a bound is missed.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.calibration import finetune, quality, speed
from benchmarks.record import environment, write

MEASURE = {"quality": quality.measure, "finetune": finetune.measure, "speed": speed.measure}
RESULTS = Path("benchmarks/results")


def main() -> None:
    arguments = parse_arguments()
    measured, checks = MEASURE[arguments.what](arguments)
    if measured is None:  # not the main rank
        return
    command = "python -m " + " ".join(["benchmarks.calibration", *sys.argv[1:]])
    record = environment() | {"command": command} | measured | {"checks": checks}
    write(arguments.record or RESULTS / f"calibration_{arguments.what}.json", record)
    print(json.dumps(record, indent=2))
    sys.exit(not all(checks.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURE))
    parser.add_argument("--record", type=Path, help="file to write to")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--length", type=int, help="tokens in one; 1,024, for speed 2,048")
    parser.add_argument(
        "--model", type=Path, help="quality, finetune: folder of a checkpoint, as SmolLM2-135M-Instruct"
    )
    parser.add_argument("--prose", type=Path, help="quality: plain text, such as WikiText-2")
    parser.add_argument("--chunks", type=int, default=8, help="quality: chunks of 1,024 tokens of each text to measure")
    parser.add_argument("--shape", choices=sorted(speed.SHAPES), default="8b", help="speed: of the model")
    parser.add_argument("--layers", type=int, default=3, help="speed: layers to measure")
    add_finetune(parser)
    arguments = parser.parse_args()
    if arguments.what == "finetune" and not (arguments.model and arguments.calibration_text and arguments.text):
        parser.error("finetune needs --model, --calibration-text and --text")
    return arguments


def add_finetune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("finetune: a text is a file, or one of Python, C++ and Markdown").add_argument
    add("--calibration-text", nargs="+", help="texts to calibrate on")
    add("--text", nargs="+", help="texts to train on and, other parts, to measure")
    add("--bases", nargs="+", choices=finetune.BASES, default=["compensated"], help="beside nearest")
    add("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="learning rates of the sweep")
    add("--seeds", type=int, default=3, help="how many, the sweep's among them")
    add("--steps", type=int, default=200, help="optimizer steps")
    add("--batch", type=int, default=2, help=f"rows of {finetune.LENGTH} tokens in a step")
    add("--folder", type=Path, default=Path("output/finetune"), help="of bases and runs")


if __name__ == "__main__":
    main()
