"""CPU time of a process and of those that it started."""

import subprocess
import sys
import time

from benchmarks.cpu_time import cpu_seconds

# Some of it is seen a little later: the system counts in ticks of some 10 ms.
SPIN = "import time; all(iter(lambda: time.process_time() < 0.5, False))"
SLEEP = "print(flush=True); time.sleep(60)"


def said(program: str) -> subprocess.Popen[bytes]:
    """A process that has said something, and sleeps."""
    process = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys, time; {program}; {SLEEP}"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_what_children_took_counts() -> None:
    with said(f"subprocess.run([sys.executable, '-c', {SPIN!r}])") as process:
        taken = cpu_seconds(process.pid)
        process.kill()
    assert 0.3 < taken < 10


def test_a_child_that_runs_counts_and_others_do_not() -> None:
    with said(f"subprocess.Popen([sys.executable, '-c', {(SPIN + '; time.sleep(3)')!r}])") as process:
        ends = time.monotonic() + 60
        while cpu_seconds(process.pid) < 0.45 and time.monotonic() < ends:
            time.sleep(0.01)
        assert time.monotonic() < ends
        before, start = cpu_seconds(process.pid), time.process_time()
        while time.process_time() < start + 0.3:
            pass
        assert cpu_seconds(process.pid) - before < 0.2
        process.kill()
