"""Run the tests that need a GPU and keep a record of it.

python -m benchmarks.gpu_tests [--record FILE] [PYTEST_ARGUMENT ...]
"""

import argparse
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.record import command, environment, write


class Outcomes:
    """A pytest plugin that counts how tests ended."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            print(f"\nfailed: {report.nodeid}", flush=True)  # at once, for who does not see the end
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(f"\nnot collected: {report.nodeid}", flush=True)
            self.counts["not collected"] += 1
            self.failed.append(report.nodeid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/gpu_tests.json"))
    arguments, rest = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; every test would be skipped")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is cut off still leaves its record
    outcomes = Outcomes()
    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *rest], plugins=[outcomes])
    record = environment() | {
        "command": command("benchmarks.gpu_tests"),
        "outcomes": dict(outcomes.counts),
        "failed": outcomes.failed,
    }
    write(arguments.record, record)
    sys.exit(status)


if __name__ == "__main__":
    main()
