"""The lines of the record, in the order in which they are run: those that may run side by side, then the large ones.

python -m benchmarks.two_gpus.lines NAME FOLDER RESULT [--short]    # one of them, in this process
"""

from functools import partial

from benchmarks.two_gpus import small
from benchmarks.two_gpus.large import LARGE, line
from benchmarks.two_gpus.line import Line, run_one

_AS_ONE_GPU = f"losses of one GPU within {small.LOSS_GAP:g}, gradient norms within {small.NORM_GAP:g}, relative"


def _mode(name: str, **options: object) -> Line:
    return Line(name, _AS_ONE_GPU, partial(small.mode, name=name, options=options), after="one-gpu")


def lines(short: bool = False) -> list[Line]:
    """All of them; ``short`` makes the large ones small."""
    return [
        Line("gather", "0 modes damaged", small.gather),
        Line("built-in", f"exact match of at least {small.LEAST_EXACT:.0%}", small.built_in_run, 120),
        Line("one-gpu", "it runs: the modes are held to it", small.reference),
        _mode("full"),
        _mode("replicate", sharding="replicate"),
        _mode("hsdp", dp_replicate=small.RANKS),
        _mode("cpu-offload", cpu_offload=True),
        Line("split-vocabulary", _AS_ONE_GPU, small.vocab_parallel, 100),
        Line("resume", "killed, resumed on two: the same losses and adapter to the bit", small.resumed, 110),
        Line("resume-on-one", f"{_AS_ONE_GPU}, when one goes on with doubled accumulation", small.resumed_on_one),
        Line("generate", "two ranks say what one says", small.generated, after="built-in"),
        Line("merge", "W + alpha / r B A to one unit in the last place", small.merged, after="built-in"),
        Line("doctor", "nothing broken", small.doctor),
        Line("optimizer", "its test over NCCL passes", small.optimizer_test),
        Line("one-dies", f"the others end in {small.ENDED_WITHIN_S:g} s, not 0, one cause", small.one_dies, 120),
        *(line(case, short) for case in LARGE),
    ]


if __name__ == "__main__":
    run_one(lines)
