"""Run the commands of docs/tour.md, and write what they print into the page, or compare it with what stands there.

    python -m tools.make_tour --smollm2 CHECKPOINT_FOLDER --data TEXT_FILE     # the page anew
    python -m tools.make_tour                                                  # its part on the built-in model anew
    python tools/make_tour.py --check                                          # that part, cut short, as CI does

A command stands behind "$ " in a block of kind console, with its output below. They run in one empty folder, without
GPUs and on one core each. Nothing of qsharded is imported: the ``qsharded`` beside this Python is what is tried.
"""

import argparse
import difflib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tour.md"
SECOND_PART = "\n## On SmolLM2"
_MODEL, _TEXT = "SmolLM2-135M-Instruct", "wikitext-2.txt"  # as the commands call them

_BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.DOTALL | re.MULTILINE)
_SETTINGS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

# What a check adds to `qsharded train`: two steps, and few rows to evaluate on.
_FEW = "few.jsonl"
_FEW_ROWS = [{"messages": [{"role": "user", "content": "cheer cat"}, {"role": "assistant", "content": "T-A-C"}]}] * 4
_SHORT = f" --max-steps 2 --eval-dataset {_FEW} --exact-match-dataset {_FEW}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the status is 1 where the page is wrong")
    parser.add_argument("--smollm2", type=Path, help=f"folder of the {_MODEL} checkpoint")
    parser.add_argument("--data", type=Path, help="a text to train it on, with a paragraph a line")
    given = parser.parse_args()
    if (given.smollm2 is None) != (given.data is None):
        parser.error("--smollm2 and --data go together")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if given.check:
            sys.exit(check(builtin_part(PAGE.read_text(encoding="utf-8")), folder))
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), folder, given.smollm2, given.data), encoding="utf-8")


def builtin_part(page: str) -> str:
    """What CI can repeat: all before the part that needs a checkpoint from outside."""
    return page.partition(SECOND_PART)[0]


def commands(part: str) -> Iterator[tuple[str, str]]:
    """Each command of ``part``, with the output that stands below it."""
    for block in _BLOCK.findall(part):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = entry.partition("\n")
            yield command, output


def written(page: str, folder: Path, smollm2: Path | None, data: Path | None) -> str:
    """The page with the output of today; of its second part only where what that needs is given."""
    first, heading, second = page.partition(SECOND_PART)
    first = _BLOCK.sub(lambda block: _block_anew(block[0], folder), first)
    if smollm2 and data:
        (folder / _MODEL).symlink_to(smollm2.resolve())
        (folder / _TEXT).symlink_to(data.resolve())
        second = _BLOCK.sub(lambda block: _block_anew(block[0], folder), second)
    return first + heading + second


def _block_anew(block: str, folder: Path) -> str:
    said = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    return "".join(f"$ {command}\n{printed(command, folder)}" for command in said)


def printed(command: str, folder: Path, added: str = "") -> str:
    """What ``command``, run in ``folder``, prints, as it may be shared.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    beside = str(Path(sys.executable).parent)
    environment = os.environ | _SETTINGS | {"PATH": f"{beside}:{os.environ['PATH']}"}
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command + added], cwd=folder, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    print(f"{time.monotonic() - begin:5.1f} s  $ {command}", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}")
    return shareable(done.stdout, folder)


def shareable(text: str, folder: Path) -> str:
    """``text`` without this machine's folders, host, kernel and user."""
    text = re.sub(r"[^\s'\"]*/qsharded/builtin/", ".../qsharded/builtin/", text)
    for place, shown in ((str(folder), "."), (str(Path.home()), "~"), (socket.gethostname(), "host")):
        text = text.replace(place, shown)
    text = re.sub(r"\bLinux-[\w.+-]+", "Linux", text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def check(part: str, folder: Path) -> int:
    """Run the commands of ``part``, training cut short; 0 if they print lines of the kinds that it has, else 1."""
    (folder / _FEW).write_text("".join(json.dumps(row) + "\n" for row in _FEW_ROWS))
    wrong = [
        line
        for command, output in commands(part)
        for line in differences(
            command, output, printed(command, folder, _SHORT if command.startswith("qsharded train") else "")
        )
    ]
    print("\n".join(wrong or ["docs/tour.md prints what it says"]))
    return 1 if wrong else 0


def differences(command: str, output: str, now: str) -> list[str]:
    """Where the kinds of lines that ``command`` prints ``now`` are others than those of ``output``; [] nowhere."""
    kind = next((kind for words, kind in _KINDS.items() if words in command), kind_of_line)
    then, found = (list(dict.fromkeys(map(kind, text.splitlines()))) for text in (output, now))
    if then == found:
        return []
    return [f"$ {command}", *difflib.unified_diff(then, found, "docs/tour.md", "now", lineterm="", n=1)]


def kind_of_line(line: str) -> str:
    """A line without figures, durations, hashes, bars and what a model has said."""
    line = re.sub(r"<\|.*|->.*", "", line)
    line = re.sub(r"\b[0-9a-f]{64}\b", "HASH", line)
    line = re.sub(r"\b(\d+ (h|min|s)\b *)+", "TIME ", line)
    line = re.sub(r"'[^']*'", "'...'", line)
    line = re.sub(r"\d[\d,.]*(e[+-]?\d+)?[kMG]?\b", "N", line)
    return " ".join(line.replace("#", "").split())


# Machines differ in what doctor finds, a model in what it answers: there the kind of a line is less.
_KINDS: dict[str, Callable[[str], str]] = {
    "qsharded doctor": lambda line: line.split(" ")[0],
    "qsharded generate": lambda line: "answer",
    "qsharded chat": lambda line: line if line.startswith(("/", "(")) else "answer",
}


if __name__ == "__main__":
    main()
