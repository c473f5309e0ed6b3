"""Cases of one parser, one after the other in this process."""

import re
import time
from random import Random

from tests.faults.fuzz.parsers import Parser


def run_cases(name: str, parser: Parser, seed: int, cases: int, first: int = 0) -> tuple[list[str], list[str], float]:
    """(how each case ended, what was wrong with those that ended wrongly, the longest time that one took in s).

    A case is "accepted" or "refused"; it ends wrongly in any error but a ValueError that names its place.
    """
    ends, failures, slowest = [], [], 0.0
    for number in range(first, first + cases):
        start = time.monotonic()
        try:
            parser.case(Random(f"{name} {seed} {number}"))
            ends.append("accepted")
        except ValueError as error:
            ends.append("refused")
            if type(error) is not ValueError or not re.search(parser.names, str(error)):
                failures.append(f"{name}, case {number}: names nothing: {type(error).__name__}: {str(error)[:300]}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            failures.append(f"{name}, case {number}: {type(error).__name__}: {str(error)[:300]}")
        slowest = max(slowest, time.monotonic() - start)
    return ends, failures, slowest
