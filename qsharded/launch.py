"""``python -m qsharded.launch``: torchrun with what our runs need, which says of a rank that the kernel killed why.

All arguments are torchrun's. On top of torchrun it sets ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, without which
restarts of ranks (``--max-restarts``) can hang in PyTorch's rendezvous.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from qsharded.config import TrainConfig, builtin_overrides, parse
from qsharded.training.memory_errors import host_plan
from qsharded.training.restarting import OWN_STORE
from qsharded.utils import hardware

_TRAIN = "qsharded.train"


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun with ``argv``, by default the process's own arguments; exits with 1 where a rank fails, as it, and
    with 128 and the number of a signal that was passed on to the ranks."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault(OWN_STORE, "1")
    before = hardware.memory_kills()
    try:
        torchrun.run(torchrun.parse_args(argv))
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None  # the ranks have said what they saved
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        killed = [rank for rank, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL]
        if killed:
            print(_killed(killed, hardware.memory_kills() - before, argv), file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _killed(ranks: Sequence[int], kills: int, argv: Sequence[str]) -> str:
    listed = f"rank {', '.join(map(str, sorted(ranks)))} of this machine was killed with SIGKILL"
    if not kills:
        return f"qsharded.launch: {listed}, not by the kernel for lack of memory: someone or something else sent it"
    lines = [f"qsharded.launch: {listed} by the kernel: the host's memory, or the control group's, was used up"]
    with suppress(ValueError, OSError, SystemExit):  # the plan is a help
        lines += _plan(argv)
    return "\n".join([*lines, "take less of it: fewer ranks a machine, no --cpu-offload, or a smaller --max-length"])


def _plan(argv: Sequence[str]) -> list[str]:
    """What the run that torchrun was to start had planned of host memory."""
    if _TRAIN not in argv:
        return []
    config = parse(argv[argv.index(_TRAIN) + 1 :], TrainConfig, fill=builtin_overrides)
    ranks = torchrun.parse_args(list(argv)).nproc_per_node
    return host_plan(config, int(ranks) if ranks.isdecimal() else hardware.default_ranks())


if __name__ == "__main__":
    main()
