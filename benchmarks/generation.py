"""A transformers model generating with bitsandbytes, with our kernels behind bitsandbytes, and with NF4Linear layers;
and our own model.

    python -m benchmarks.generation [--ways graph compiled-graph generate] [--variants native ...] [--record FILE]

The models have the shape of Llama-3-8B and random weights; those of transformers share their bytes. Each generates
greedily at batch 1, 8 and 64, in three ways: token by token from a CUDA graph of one forward, over transformers' static
cache or our own, plain (graph) and compiled (compiled-graph), and by ``generate()`` as it comes. Takes about six
minutes on an H200, most of it to compile.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import qsharded
from benchmarks import native_generation
from benchmarks.gpu_training import SHAPES
from benchmarks.record import command, environment, write
from qsharded.integrations.bitsandbytes import convert_bitsandbytes, install, to_bitsandbytes, uninstall
from qsharded.nn import NF4Linear

BATCHES = (1, 8, 64)
PROMPT, NEW_TOKENS, ROUNDS = 128, 64, 3
WANTED = {1: 1.5, 8: 2.0, 64: 2.0}
"""Ours over bitsandbytes, by batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, NATIVE], default=[*VARIANTS, NATIVE])
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/generation.json"))
    arguments = parser.parse_args()
    record = environment() | {
        "command": command("benchmarks.generation"),
        "shape": "llama3-8b, random weights, bf16",
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "wanted_over_bitsandbytes": WANTED,
    }
    rows: list[dict[str, Any]] = []
    what = BATCHES, NEW_TOKENS, arguments.ways, arguments.variants
    for row in measure(SHAPES["llama3-8b"], torch.device("cuda"), *what):
        rows.append(row)
        record |= {"rows": rows, "over_bitsandbytes": ratios(rows)}
        write(arguments.record, record)  # each time: compiling takes long
    print(json.dumps(record["over_bitsandbytes"], indent=2))


def measure(
    shape: dict[str, Any],
    device: torch.device,
    batches: tuple[int, ...],
    new: int,
    ways: Iterable[str],
    variants: Iterable[str],
) -> Iterator[dict[str, Any]]:
    """One row for each way to run it, variant and batch, printed as it comes."""
    theirs = [name for name in variants if name != NATIVE]
    model: Any = random_model(shape, device) if theirs else None
    for way, variant in itertools.product(ways, theirs):
        VARIANTS[variant](model)
        yield from _rows(WAYS[way], model, {"variant": variant, "way": way}, shape, device, batches, new)
    uninstall()
    del model
    if NATIVE in variants:
        native = native_generation.random_native_model(shape, device)
        for way in (way for way in ways if way in NATIVE_WAYS):
            yield from _rows(NATIVE_WAYS[way], native, {"variant": NATIVE, "way": way}, shape, device, batches, new)


def _rows(
    run: Callable[..., list[float]],
    model: Any,
    named: dict[str, str],
    shape: dict[str, Any],
    device: torch.device,
    batches: tuple[int, ...],
    new: int,
) -> Iterator[dict[str, Any]]:
    for batch in batches:
        ids = torch.randint(shape["vocab_size"], (batch, PROMPT), device=device)
        row = {"variant": named["variant"], "batch": batch, "way": named["way"]} | _attempt(run, model, ids, new)
        print(json.dumps(row), flush=True)
        yield row


def random_model(shape: dict[str, Any], device: torch.device) -> nn.Module:
    """In NF4, double-quantized, all linear layers but the head."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return qsharded.quantize_(model).eval()


def _as_bitsandbytes(model: nn.Module) -> None:
    uninstall()
    if _has_nf4_linear(model):
        to_bitsandbytes(model, torch.bfloat16)


def _with_our_kernels(model: nn.Module) -> None:
    _as_bitsandbytes(model)
    install()


def _as_nf4_linear(model: nn.Module) -> None:
    uninstall()
    if not _has_nf4_linear(model):
        convert_bitsandbytes(model)


def _has_nf4_linear(model: nn.Module) -> bool:
    return any(isinstance(module, NF4Linear) for module in model.modules())


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "bitsandbytes": _as_bitsandbytes,
    "NF4Linear": _as_nf4_linear,
    "bitsandbytes, our kernels": _with_our_kernels,
}


@torch.no_grad()
def _attempt(run: Callable[..., list[float]], model: nn.Module, ids: Tensor, new: int) -> dict[str, Any]:
    """Median and spread of the rounds, or why it did not run: one failure must not cost the others."""
    try:
        seconds = run(model, ids, new)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    tokens = len(ids) * new
    return {
        "tokens_per_second": round(tokens / median(seconds), 1),
        "ms_per_token": round(median(seconds) / new * 1e3, 3),
        "spread_percent": round(100 * (max(seconds) - min(seconds)) / median(seconds), 1),
    }


def _by_generate(model: Any, ids: Tensor, new: int) -> list[float]:
    """Seconds of whole calls of ``generate()``, the prompt's forward included."""

    def call(count: int) -> None:
        model.generate(ids, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)

    call(4)
    return [_seconds(lambda: call(new)) for _ in range(ROUNDS)]


def _by_graph(model: Any, ids: Tensor, new: int, compiled: bool = False) -> list[float]:
    """Seconds of ``new`` replays of a graph of one greedy step, the prompt's forward left out."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    token, forward = ids[:, -1:].clone(), torch.compile(model, dynamic=False) if compiled else model

    def begin() -> None:
        cache.reset()
        token.copy_(_next_token(model, ids, cache))

    def step() -> None:
        token.copy_(_next_token(forward, token, cache))

    begin()
    graph = _captured(step)

    def replay() -> None:
        for _ in range(new):
            graph.replay()

    return [_seconds(replay, begin) for _ in range(ROUNDS)]


def _by_compiled_graph(model: Any, ids: Tensor, new: int) -> list[float]:
    """The same with the step compiled, which fuses what lies between the products."""
    torch.compiler.reset()
    return _by_graph(model, ids, new, compiled=True)


def _next_token(forward: Any, ids: Tensor, cache: StaticCache) -> Tensor:
    return forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def _captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what runs before a capture has to run on another stream than the default
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


WAYS: dict[str, Callable[..., list[float]]] = {
    "graph": _by_graph,
    "compiled-graph": _by_compiled_graph,
    "generate": _by_generate,
}


NATIVE = "native"
NATIVE_WAYS: dict[str, Callable[..., list[float]]] = {
    "graph": lambda model, ids, new: native_generation.replayed(model, ids, new, _seconds, ROUNDS),
    "generate": lambda model, ids, new: native_generation.by_generate(model, ids, new, _seconds, ROUNDS),
}


def _seconds(run: Callable[[], None], before: Callable[[], object] = lambda: None) -> float:
    before()
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second over those of bitsandbytes, where both ran."""
    speeds = {(r["variant"], r["batch"], r["way"]): r["tokens_per_second"] for r in rows if "tokens_per_second" in r}
    return [
        {"variant": variant, "batch": batch, "way": way, "ratio": round(speed / speeds["bitsandbytes", batch, way], 2)}
        for (variant, batch, way), speed in speeds.items()
        if variant != "bitsandbytes" and ("bitsandbytes", batch, way) in speeds
    ]


if __name__ == "__main__":
    main()
