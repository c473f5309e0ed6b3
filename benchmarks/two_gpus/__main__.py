"""Everything that takes two GPUs, in one command and one record: what was asked, what came, pass or fail.

    python -m benchmarks.two_gpus [--lines NAME ...] [--minutes 9] [--record FILE] [--logs FOLDER]
    python -m benchmarks.two_gpus --short    # the same lines with tiny shapes, on a machine without GPUs, over gloo

Each line runs in a process of its own under a limit of its own; one that fails leaves the others alone. The record is
written after every line. The exit status is 1 unless all lines passed.
"""

from benchmarks.two_gpus.command import record_lines
from benchmarks.two_gpus.lines import lines


def main() -> None:
    record_lines("benchmarks.two_gpus", __doc__, "benchmarks.two_gpus.lines", lines)


if __name__ == "__main__":
    main()
