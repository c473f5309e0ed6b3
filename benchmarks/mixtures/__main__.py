"""Large mixtures with adapters on the experts, random weights: speed, memory, and the plan beside it.

    python -m benchmarks.mixtures [--lines NAME ...] [--minutes 9] [--record FILE] [--logs FOLDER]
    python -m benchmarks.mixtures --short    # tiny shapes over gloo, on a machine without GPUs

Two GPUs. Each line runs in a process of its own under a limit of its own. The exit status is 1 unless all passed.
"""

from benchmarks.mixtures.lines import lines
from benchmarks.two_gpus.command import record_lines


def main() -> None:
    record_lines("benchmarks.mixtures", __doc__, "benchmarks.mixtures.lines", lines)


if __name__ == "__main__":
    main()
