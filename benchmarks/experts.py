"""The MLPs of a layer's experts, forward: ours, dequantizing all of them first, and weights that are ready in 16 bits.

    python -m benchmarks.experts [--shape qwen3-30b-a3b] [--tokens 1 16 256 8192] [--repeats 30] [--record FILE]

All three sort the tokens alike and multiply by ``torch._grouped_mm`` (or a loop where there is none); each token's
experts are drawn evenly. Medians, the cache flushed before each call.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import in_turns
from benchmarks.record import command, environment, write
from qsharded.quant.expert_product import ExpertMLP, expert_product
from qsharded.quant.experts import ExpertLinears, PackedExperts, PlainExpertWeights
from qsharded.quant.formats import NF4_64
from qsharded.quant.routing import Routed


class Shape(NamedTuple):
    """Of a layer: experts, how many compute a token, its width, and the experts' own."""

    experts: int
    per_token: int
    hidden: int
    intermediate: int


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "glm-4.5-air": Shape(128, 8, 4096, 1408),
    "tiny": Shape(4, 2, 128, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 8192])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = measure(SHAPES[given.shape], given.tokens, given.repeats, device)
    for row in rows:
        print(json.dumps(row), flush=True)
    if given.record:
        write(given.record, environment() | {"command": command("benchmarks.experts"), "rows": rows})


@torch.no_grad()
def measure(shape: Shape, tokens: list[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Microseconds of each way, and ours in relation to the others."""
    torch.manual_seed(0)
    D, J = shape.hidden, shape.intermediate
    with device:
        packed = [random_experts(shape.experts, K, N) for N, K in ((J, D), (J, D), (D, J))]
    ready = [experts.packed().decoded(slice(None), torch.bfloat16) for experts in packed]
    rows = []
    for M in tokens:
        times = in_turns(ways(shape, M, packed, ready, device), device, repeats)
        ours, decoded, plain = (times[name].median for name in ("ours", "dequantize all", "16 bits"))
        microseconds = {name: round(time.median, 1) for name, time in times.items()}
        ratios = {"times_dequantize_all": round(decoded / ours, 2), "of_16_bits": round(plain / ours, 3)}
        rows.append({"shape": shape._asdict(), "tokens": M, "microseconds": microseconds, **ratios})
    return rows


def random_experts(experts: int, K: int, N: int) -> PackedExperts:
    return PackedExperts.from_experts(ExpertLinears(experts, K, N), quant_format=NF4_64)


def ways(
    shape: Shape, M: int, packed: list[PackedExperts], ready: list[Tensor], device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Each computes the same tokens, which are routed within what is timed."""
    x = torch.randn(M, shape.hidden, device=device, dtype=torch.bfloat16)
    scores, chosen = torch.rand(M, shape.experts, device=device).topk(shape.per_token)

    def product(weights: list[Any]) -> Tensor:
        gate, up, down = weights
        mlp = ExpertMLP(gate, up, down, (None, None, None), lambda gate, up: F.silu(gate) * up)
        return expert_product(x, scores, Routed.of(chosen, shape.experts), mlp)

    def dequantize_all() -> Tensor:
        return product([PlainExpertWeights(part.packed().decoded(slice(None), x.dtype)) for part in packed])

    return {
        "ours": lambda: product([part.packed() for part in packed]),
        "dequantize all": dequantize_all,
        "16 bits": lambda: product([PlainExpertWeights(weight) for weight in ready]),
    }


if __name__ == "__main__":
    main()
