"""Faults that take two GPUs to be shown, in one command and one record: what was asked, what was printed, pass or fail.

    python -m benchmarks.gpu_faults [--lines NAME ...] [--record FILE] [--logs FOLDER]
    python -m benchmarks.gpu_faults --short    # over gloo, on a machine without GPUs; no GPU is out of memory there

Each line runs in a process of its own under a limit of its own. The exit status is 1 unless all lines passed.
"""

from benchmarks.gpu_faults.lines import lines
from benchmarks.two_gpus.command import record_lines


def main() -> None:
    record_lines("benchmarks.gpu_faults", __doc__, "benchmarks.gpu_faults.lines", lines)


if __name__ == "__main__":
    main()
