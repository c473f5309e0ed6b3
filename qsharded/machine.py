"""What this machine has: memory, disk, GPUs. Nothing here needs a GPU."""

import os
import shutil
from pathlib import Path

import torch

GIB = 2**30


def available_memory() -> int:
    """Bytes of host memory that programs can still take, as the kernel and this process's control group see it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None  # "max" is no limit


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is, or will be once it is made."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU; None where there is none."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes, default=None)


def default_ranks() -> int:
    """How many ranks torchrun was asked for; without it, one for each GPU, or one."""
    return int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count() or 1
