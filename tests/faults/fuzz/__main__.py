"""``python -m tests.faults.fuzz --cases 100000``: every parser, or those named; prints what each case ends in."""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import command, environment, write
from tests.faults.fuzz.coverage_of import covered
from tests.faults.fuzz.parsers import Parser, parsers
from tests.faults.fuzz.run import run_cases


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=100_000, help="for each parser")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parser", action="append", help="only this one; may be repeated")
    options.add_argument("--covered-cases", type=int, default=0, help="so many more, whose coverage is recorded")
    options.add_argument("--record", type=Path, help="a JSON file to write the numbers to")
    given = options.parse_args()
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name, parser in parsers(Path(folder)).items():
            if not given.parser or name in given.parser:
                record[name] = _measured(name, parser, given.seed, given.cases)
                if given.covered_cases:
                    cases = partial(run_cases, name, parser, given.seed, given.covered_cases, first=given.cases)
                    record[name]["coverage"] = covered(name, cases)
                print(name, json.dumps(record[name]), flush=True)
    if given.record:
        head = environment() | {"command": command("tests.faults.fuzz"), "seed": given.seed}
        write(given.record, head | {"parsers": [{"parser": name} | found for name, found in record.items()]})
    sys.exit(any(result["unnamed"] for result in record.values()))


def _measured(name: str, parser: Parser, seed: int, cases: int) -> dict[str, Any]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    ends, failures, slowest = run_cases(name, parser, seed, cases)
    for failure in failures[:10]:
        print(failure, file=sys.stderr)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    counted = Counter(ends)
    return {
        "cases": cases,
        "refused": counted["refused"],
        "accepted": counted["accepted"],
        "unnamed": len(failures),
        "slowest_s": round(slowest, 3),
        "grown_mib": round(grown / 1024, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


main()
