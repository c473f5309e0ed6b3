"""CPU time of processes: what other work on the machine changes less than the time on the clock."""

import os
from pathlib import Path


def cpu_seconds(process: int) -> float:
    """What ``process`` and all that it has started have taken so far; those that have ended if they were waited for."""
    stats = [found for path in Path("/proc").glob("[0-9]*/stat") if (found := _stat(path)) is not None]
    family = {process}
    while more := {number for number, parent, _ in stats if parent in family} - family:
        family |= more
    return sum(ticks for number, _, ticks in stats if number in family) / os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> tuple[int, int, int] | None:
    """(process, its parent, ticks of it and of its children that it waited for)."""
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    return int(path.parent.name), int(fields[1]), sum(map(int, fields[11:15]))
