"""One rank of the trainer's own command, with a fault: ``python -m benchmarks.gpu_faults.rank FAULT FLAGS ...``.

FAULT is ``infinite:N``, rank 1's loss in step N, or ``out-of-memory:N``, every rank's error in step N, for machines
whose GPUs are not to be filled, or have none.
"""

import sys
from typing import Any

import torch

from qsharded import train
from qsharded.cli.command import run_as_process
from qsharded.data import Batch
from qsharded.models import CausalLM
from qsharded.training import objective, trainer

_NO_ROOM = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.50 GiB"


def main() -> None:
    fault, _, step = sys.argv.pop(1).partition(":")
    accumulate, loss = trainer.accumulate_gradient, objective.batch_loss

    def faulty(model: CausalLM, batch: Batch) -> torch.Tensor:
        if fault == "out-of-memory":
            raise torch.OutOfMemoryError(_NO_ROOM)
        return loss(model, batch) * (torch.inf if torch.distributed.get_rank() == 1 else 1)

    def accumulate_faulty(*args: Any, step_number: int, **named: Any) -> Any:
        objective.batch_loss = faulty if step_number + 1 == int(step) else loss
        return accumulate(*args, step_number=step_number, **named)

    trainer.accumulate_gradient = accumulate_faulty
    train.main()


if __name__ == "__main__":
    run_as_process(main)
