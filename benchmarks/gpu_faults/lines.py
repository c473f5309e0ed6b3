"""The lines of the record.

python -m benchmarks.gpu_faults.lines NAME FOLDER RESULT [--short]    # one of them, in this process
"""

from benchmarks.gpu_faults import faults
from benchmarks.gpu_faults.out_of_memory import out_of_memory
from benchmarks.gpu_faults.self_check import self_check
from benchmarks.two_gpus.line import Line, run_one


def lines(short: bool = False) -> list[Line]:
    """All of them; ``short`` changes nothing but where they look for a GPU."""
    return [
        Line("hang", "a stopped rank is named; stacks and NCCL's flight record; exit status 75", faults.hang),
        Line("not-finite", "no rank steps; the rows' file and line are written down", faults.not_finite),
        Line("restart", "killed under qsharded.launch: the undisturbed bytes, moments too", faults.restart, 100),
        Line(
            "self-check",
            "a layer of 405B's width is as its bytes unsharded, in a second and a layer's memory",
            self_check,
            alone=True,
        ),
        Line(
            "out-of-memory", "one message: planned and measured, what fits; exit status 74", out_of_memory, alone=True
        ),
    ]


if __name__ == "__main__":
    run_one(lines)
