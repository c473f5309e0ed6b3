"""What this machine has: memory, disk, GPUs. Nothing here needs a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from qsharded.utils.durable_files import disk_usage

GIB = 2**30
_GROUPS, _OWN_GROUP, _VMSTAT = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/vmstat")


def available_memory() -> int:
    """Bytes of host memory that programs can still take, as the kernel and this process's control group see it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *(max(0, limit - used) for limit, used in _groups())])


def memory() -> int:
    """Bytes of host memory that this process may share with others: the machine's, or its control group's limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _groups())])


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of this process's control group and of those around it, where they have a limit."""
    listed = _OWN_GROUP.read_text().splitlines() if _OWN_GROUP.is_file() else []
    own = next((line[3:] for line in listed if line.startswith("0::")), "/")
    inside = PurePosixPath(own.lstrip("/"))
    for part in (inside, *inside.parents):
        group = _GROUPS / part
        limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
        if limit is not None and used is not None:
            yield limit, used - _page_cache(group)


def memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory, on the machine or in this control group, as far as
    it says; to be compared with an earlier count."""
    listed = _OWN_GROUP.read_text().splitlines() if _OWN_GROUP.is_file() else []
    own = next((line[3:] for line in listed if line.startswith("0::")), "/")
    files = (_VMSTAT, _GROUPS / own.lstrip("/") / "memory.events")
    lines = [line.split() for file in files if file.is_file() for line in file.read_text().splitlines()]
    return sum(int(words[1]) for words in lines if words[0] == "oom_kill")


def _page_cache(group: Path) -> int:
    """Bytes of files that the kernel gives up as soon as they are asked for; they count as in use."""
    path = group / "memory.stat"
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None  # "max" is no limit


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is, or will be once it is made."""
    free: int = disk_usage(path).free
    return free


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU; None where there is none."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes, default=None)


def gpu_name() -> str | None:
    """What CUDA calls the first GPU; None where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.device_count() else None


def default_ranks() -> int:
    """How many ranks torchrun was asked for; without it, one for each GPU, or one."""
    return int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count() or 1
