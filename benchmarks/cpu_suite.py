"""Run the whole test suite as a machine without GPUs does, under the torch that is here, and keep a record of it.

    python -m benchmarks.cpu_suite [--minutes 4] [--workers 16] [--record FILE] [PYTEST_ARGUMENT ...]

For the oldest torch that is supported, which no CI machine has. Its Triton, 3.6, interprets kernels only with NumPy
below 2.4, from which on an array of one element is no integer. What has not run when the time is over is missing in the
counts, and the record says that the suite is incomplete. Files whose packages are not here count as not collected.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_tests import Outcomes
from benchmarks.record import command, environment, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="the suite is stopped then")
    parser.add_argument("--workers", type=int, default=16, help="processes")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/cpu_tests_oldest_torch.json"))
    given, rest = parser.parse_known_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first asked for, here and in the workers
    for cut_off in (signal.SIGALRM, signal.SIGTERM):  # a run that is cut off still leaves its record
        signal.signal(cut_off, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * given.minutes)
    outcomes, start = Outcomes(), time.monotonic()
    processes = ["-n", str(given.workers), "--dist", "worksteal"]
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *processes]
    status = pytest.main([*options, *rest], plugins=[outcomes])
    signal.setitimer(signal.ITIMER_REAL, 0)
    record = environment() | {
        "command": command("benchmarks.cpu_suite"),
        "complete": status != pytest.ExitCode.INTERRUPTED,
        "seconds": round(time.monotonic() - start),
        "outcomes": dict(outcomes.counts),
        "failed": outcomes.failed,
    }
    write(given.record, record)
    print(json.dumps(record, indent=2))
    sys.exit(status)


if __name__ == "__main__":
    main()
