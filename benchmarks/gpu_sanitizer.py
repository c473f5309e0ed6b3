"""Run the CUDA kernels' tests under NVIDIA's compute-sanitizer and keep a record of what it says.

python -m benchmarks.gpu_sanitizer [--tools memcheck,racecheck] [--jobs 6] [--record FILE] [PYTEST_ARGUMENT ...]

Needs the CUDA toolkit. Only our kernels are watched. The tests are dealt out to as many processes a tool as --jobs
says, all at once. The exit status is 1 where a tool or a test found an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.record import command, environment, write

TOOLS = ("memcheck", "racecheck")
FOUND = 99  # the sanitizer's exit status where it found an error, unlike any of pytest's
TESTS = ("test_cuda_nf4.py", "test_cuda_linear.py", "test_absmax.py")
# what takes gigabytes or thousands of launches, graphs, which need PyTorch's own allocator, and profiles, which need
# what the sanitizer has taken
LEFT_OUT = ("beyond_32_bits", "every_pair", "every_half", "same_bits", "graph", "on_hopper")
SHARE = "QSHARDED_SANITIZER_SHARE"  # "2/6": of six processes the third


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=lambda text: text.split(","), default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=6, help="processes a tool (6)")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/gpu_sanitizer.json"))
    arguments, rest = parser.parse_known_args()
    sanitizer = find()
    if sanitizer is None or not torch.cuda.is_available():
        parser.error("needs a CUDA GPU and compute-sanitizer, which is a part of the CUDA toolkit")
    with ThreadPoolExecutor(len(arguments.tools) * arguments.jobs) as pool:
        started = [
            pool.submit(run, sanitizer, tool, f"{share}/{arguments.jobs}", rest)
            for tool in arguments.tools
            for share in range(arguments.jobs)
        ]
    results = [future.result() for future in started]
    record = environment() | {"command": command("benchmarks.gpu_sanitizer"), "runs": results}
    write(arguments.record, record)
    sys.exit(any(result["status"] for result in results))


def find() -> str | None:
    """The program, on the path or in the toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def run(sanitizer: str, tool: str, share: str, pytest_arguments: list[str]) -> dict[str, object]:
    """One tool over a share of the tests: its exit status and the lines that sum up, its own and pytest's."""
    watch = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-regex", "kns=qsharded"]
    watch += ["--target-processes", "application-only"]  # not the compiler, which the tests start
    chosen = ["-m", "gpu", "-k", " and ".join(f"not {name}" for name in LEFT_OUT), "-p", "benchmarks.gpu_sanitizer"]
    files = [f"tests/kernels/{name}" for name in TESTS]
    tests = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *chosen, *files, *pytest_arguments]
    # each tensor in memory of its own, so that what lies beside it belongs to no other
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", SHARE: share}
    process = subprocess.Popen([sanitizer, *watch, *tests], env=alone, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    summary = []
    for line in process.stdout:
        print(f"{tool} {share}: {line}", end="", flush=True)
        if "SUMMARY" in line or " passed" in line or " failed" in line:
            summary.append(line.strip("= \n"))
    return {"tool": tool, "share": share, "status": process.wait(), "summary": summary}


@pytest.hookimpl(trylast=True)  # when the tests are chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the processes started above, where pytest takes this module for a plugin: keep this one's share."""
    share, shares = map(int, os.environ[SHARE].split("/"))
    items[:] = items[share::shares]


if __name__ == "__main__":
    main()
