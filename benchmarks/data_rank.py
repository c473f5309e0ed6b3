"""One process of :mod:`benchmarks.data`: what a rank does with its data from its start on.

python -m benchmarks.data_rank FOLDER {fill,start} [packing] [small]
"""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks.data import peak_mb
from qsharded.config import TrainConfig
from qsharded.data import StepLoader, Tokenizer
from qsharded.data.fingerprint import RowsFingerprint
from qsharded.distributed.world import World
from qsharded.training import datasets
from qsharded.training.tokenized import load_datasets

STEPS = 2000


def main() -> None:
    """What ``qsharded.training.datasets`` does with data, up to the first batch; then more batches, for the memory."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    print("imported", flush=True)
    start, begun = time.perf_counter(), time.process_time()
    dataset = folder / ("small.jsonl" if "small" in words else "rows")
    config = TrainConfig(
        model=str(folder / "model"),
        dataset=str(dataset),
        data_cache=str(folder / "cache"),
        packing="packing" in words,
    )
    world = World.single_process(torch.device("cpu"))
    tokenizer = Tokenizer.from_folder(folder / "model")
    data, _ = load_datasets(config, tokenizer, world)
    if words[0] == "fill":
        return
    loader: StepLoader = datasets._loader(
        config, world, tokenizer, data, config.per_device_train_batch_size, shuffle=True
    )
    datasets._check_vocabulary(1 << 20, [data.examples])
    loader.steps_in_epoch(0)
    RowsFingerprint.of(data.examples, tokenizer.files)
    steps = loader.steps()
    next(steps)
    seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    for _ in islice(steps, STEPS):
        pass
    print(json.dumps({"seconds": round(seconds, 3), "cpu": round(cpu, 3), "mb": round(peak_mb(), 1)}))


if __name__ == "__main__":
    main()
