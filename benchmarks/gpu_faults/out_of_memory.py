"""GPUs that another process fills, and a run that then finds no room in a step."""

import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_faults.ranks import BUILTIN, start, statuses
from benchmarks.gpu_training import SHAPES, shape_options
from benchmarks.two_gpus.runner import Found
from benchmarks.two_gpus.small import RANKS
from qsharded.utils.exit_codes import OUT_OF_MEMORY
from qsharded.utils.hardware import GIB

LAYERS, ROWS, LENGTH = 4, 16, 2048
LEFT_GIB = 9.0  # room for the weights, of which a rank has some 1.5 GiB, and for CUDA; the activations take 13 more
SHAPE = SHAPES["llama3-8b"] | {"num_hidden_layers": LAYERS}
ROW = re.compile(r"^  (?P<name>\S.*?) {2,}(?P<figures>[\d.]+(?: +[\d.]+)?)$")
WEIGHTS = "codes", "scales", "embedding and head", "adapters"
WEIGHTS_GAP = 0.01  # of the plan: what a class of weights takes is known to the byte


def out_of_memory(folder: Path) -> Found:
    """On a machine without GPUs the error is raised, not met, by the built-in model."""
    own = folder / "out-of-memory"
    if not torch.cuda.is_available():
        options = BUILTIN | {"max_steps": 3, "activation_checkpointing": "none"}
        ranks = start(own, ["benchmarks.gpu_faults.rank", "out-of-memory:2"], options | {"output_dir": own / "output"})
        return found_of(statuses(ranks), [rank.said() for rank in ranks], 2)
    options = (
        shape_options(SHAPE, folder / "data", ROWS * RANKS * 2, LENGTH)
        | BUILTIN
        | {
            "random_init": True,
            "activation_checkpointing": "none",
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": 1,
            "output_dir": own / "output",
        }
    )
    for name in ("eval_dataset", "exact_match_dataset"):
        options.pop(name)
    ballast = [_fill(torch.device("cuda", index)) for index in range(RANKS)]
    ranks = start(own, ["qsharded.train"], options)
    found = found_of(statuses(ranks), [rank.said() for rank in ranks], 1)
    del ballast
    return found


def _fill(device: torch.device) -> torch.Tensor:
    free, _ = torch.cuda.mem_get_info(device)
    filled = torch.empty(max(0, free - int(LEFT_GIB * GIB)), dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    return filled


def found_of(found: list[int], said: list[list[str]], step: int) -> Found:
    """``said``: by each rank."""
    told = [lines for lines in said if any("out of GPU memory in " in line for line in lines)]
    lines = told[0] if told else []
    start = next((index for index, line in enumerate(lines) if "out of GPU memory in " in line), 0)
    message = lines[start:]
    figures = {match["name"]: match["figures"].split() for line in message if (match := ROW.match(line.rstrip()))}
    both = {name: [float(value) for value in values] for name, values in figures.items() if len(values) == 2}
    weights = {name: values for name, values in both.items() if name in WEIGHTS}
    held = {
        "exit status": found == [OUT_OF_MEMORY] * RANKS,
        "one message": len(told) == 1,
        f"in step {step}": any(f"out of GPU memory in step {step}: CUDA out of memory" in line for line in message),
        "planned and measured": set(WEIGHTS) == weights.keys(),
        "as planned": all(abs(a - b) <= WEIGHTS_GAP * a + 0.001 for a, b in weights.values()),
        "the peak": len(figures.get("allocated at the peak", [])) == (2 if torch.cuda.is_available() else 1),
        "what fits": any(": needs " in line for line in message),
    }
    came: dict[str, Any] = {"exit_statuses": found, "printed": message}
    return Found(came, [name for name, holds in held.items() if not holds])
