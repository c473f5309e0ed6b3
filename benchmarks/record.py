"""What every benchmark record says of where it was made."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qsharded.utils.environment import processor, version

_PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "accelerate")


def environment() -> dict[str, Any]:
    """Date, commit, processor, GPU and versions, for the top of a record."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "versions": {name: version(name) for name in _PACKAGES if version(name)},
    }


def command(module: str) -> str:
    """The command line that runs ``module`` as now."""
    return " ".join(["python -m", module, *sys.argv[1:]])


def commit() -> str | None:
    """What QSHARDED_COMMIT says, for a copy without its history; else the commit that is checked out, marked where
    files differ from it, or None."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    said = os.environ.get("QSHARDED_COMMIT")
    return said or subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def write(path: Path, record: dict[str, Any]) -> Path:
    """The record as JSON, each row of a list on a line of its own, so that changes of it can be read."""
    fields = (f" {json.dumps(name)}: {_by_rows(value)}" for name, value in record.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")
    return path


def _by_rows(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)
