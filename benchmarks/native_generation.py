"""The native model's part of ``benchmarks.generation``: graphs as ``qsharded generate`` replays them."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsharded.checkpoint import load_model
from qsharded.models import CausalLM
from qsharded.models.decoding import GraphDecoding, can_replay
from qsharded.models.generation import generate
from qsharded.models.sampling import Sampling

GREEDY = Sampling()
_BEFORE_REPLAYS = 2  # steps: one as it is written, one that is captured


def random_native_model(shape: dict[str, Any], device: torch.device) -> CausalLM:
    """In NF4, double-quantized, all linear layers but the head."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        return load_model(folder, device=device, random_init=True).eval()


def replayed(model: CausalLM, ids: Tensor, new: int, seconds: Callable[..., float], rounds: int) -> list[float]:
    """Seconds of ``new`` replayed steps, the prompt's forward left out. ``seconds``: of (run, before)."""
    if not can_replay(model):
        raise ValueError("CUDA graphs do not serve here")
    steps = iter(())

    def begin() -> None:
        nonlocal steps
        steps = steps_after(model, ids, _BEFORE_REPLAYS + new)
        for _ in itertools.islice(steps, _BEFORE_REPLAYS - 1):
            pass  # the host is a step behind

    return [seconds(lambda: list(steps), begin) for _ in range(rounds)]


def steps_after(model: CausalLM, ids: Tensor, count: int) -> Any:
    """The tokens of so many greedy steps after the prompts ``ids``."""
    cache = model.new_cache(ids.shape[1] + count + 1)
    next_B = GREEDY.choose(model(ids, cache=cache, last_only=True)[:, -1], None)
    position_B1 = torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
    generator = torch.Generator(ids.device)
    return GraphDecoding(model, cache, next_B, position_B1, None, GREEDY, None, generator).tokens(count)


def by_generate(model: CausalLM, ids: Tensor, new: int, seconds: Callable[..., float], rounds: int) -> list[float]:
    """Seconds of whole calls of ``generate()``, the prompt's forward and the capture included."""
    prompts = ids.tolist()

    def call() -> None:
        generate(model, prompts, max_new_tokens=new, eos_ids=(), graphs=True)

    call()
    return [seconds(call) for _ in range(rounds)]
