"""Divergence from the original in fp32, and perplexity, of every kind of base, over four domains."""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.calibration import texts
from qsharded import quantize
from qsharded.calibration.adapters import start_from_residual
from qsharded.calibration.rows import read_calibration_rows
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import stored_name
from qsharded.checkpoint.load import Outline
from qsharded.data import Tokenizer
from qsharded.lora.config import LoRAConfig
from qsharded.lora.layer import lora_layers

CHUNK, RANK = 1024, 16
METHODS = "nearest", "search", "compensated"
# parts of nearest's figures: KL in every domain, and the gap of perplexity on prose
MOST_KL = {"search": 0.58, "compensated": 0.32, "compensated + residual adapter": 0.24}
MOST_GAP = 0.35
_CPU = torch.device("cpu")
Logits = Callable[[Tensor], Tensor]


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bool]]:
    """The table, and whether each bound holds."""
    length = arguments.length or CHUNK
    domains = texts.texts(arguments.prose)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [texts.write_rows(domains[name], folder / f"{name}.jsonl") for name in texts.CALIBRATED]
        seconds = {method: quantized(arguments, length, rows, method, folder / method) for method in METHODS}
        models = {method: load_model(folder / method, dtype=torch.float32, device="cpu") for method in METHODS}
        for method in ("nearest", "compensated"):
            models[f"{method} + residual adapter"] = adapted(arguments, length, rows, folder / method)
        sizes = {method: (folder / method / "model.safetensors").stat().st_size for method in METHODS}
        difference = bitsandbytes_difference(arguments.model, rows, folder)
    table = measured_table(arguments, domains, {name: model.eval() for name, model in models.items()})
    checks = bounds(table) | {
        "as many bytes": len(set(sizes.values())) == 1,
        "bitsandbytes decodes them with no difference": difference == 0,
    }
    record = {"texts": texts.origins(), "calibrated_on": texts.CALIBRATED, "rows": arguments.rows, "length": length}
    return record | {"measured_tokens": arguments.chunks * CHUNK, "seconds": seconds, "table": table}, checks


def quantized(arguments: argparse.Namespace, length: int, rows: list[Path], method: str, folder: Path) -> float:
    """Seconds that the command takes."""
    flags = ["--model", str(arguments.model), "--output", str(folder), "--method", method]
    if method != "nearest":
        flags += ["--calibrate", *map(str, rows), "--calibrate-rows", str(arguments.rows)]
        flags += ["--calibrate-length", str(length)]
    begun = time.perf_counter()
    quantize.main(flags)
    return round(time.perf_counter() - begun, 1)


def adapted(arguments: argparse.Namespace, length: int, rows: list[Path], base: Path) -> Any:
    """The base with adapters that begin with its residual."""
    lora = LoRAConfig(r=RANK)
    tokenizer = Tokenizer.from_folder(arguments.model)
    outline = Outline.of(base, lora, torch.float32, random_init=False)
    vocabulary = outline.model.config.vocab_size
    calibration = read_calibration_rows(list(map(str, rows)), tokenizer, arguments.rows, length, vocabulary)
    tensors = start_from_residual(
        outline.model, outline.packed, arguments.model, calibration, _CPU, torch.float32, seed=0
    )
    model = load_model(base, dtype=torch.float32, device="cpu", lora=lora)
    for name, layer in lora_layers(model):
        for part, parameter in layer.updates().items():
            parameter.data.copy_(tensors[stored_name(model, f"{name}.{part}")])
    return model


def bitsandbytes_difference(model: Path, rows: list[Path], folder: Path) -> float:
    """The largest between a weight of the other format, as bitsandbytes decodes it, and ours; few rows suffice."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    ours, theirs = folder / "few", folder / "few-bitsandbytes"
    for target, form in ((ours, "qsharded"), (theirs, "bitsandbytes")):
        flags = ["--model", str(model), "--output", str(target), "--format", form, "--method", "search"]
        sizes = ["--calibrate-rows", str(len(rows)), "--calibrate-length", "128"]
        quantize.main([*flags, "--calibrate", *map(str, rows), *sizes])
    found = load_model(ours, dtype=torch.float32, device="cpu")
    name = "model.layers.0.mlp.down_proj"
    with safe_open(theirs / "model.safetensors", "pt") as file:
        parts = {key.removeprefix(f"{name}.weight."): file.get_tensor(key) for key in file.keys() if name in key}  # noqa: SIM118
    codes = parts.pop(f"{name}.weight")
    state = QuantState.from_dict(parts, device=_CPU)
    expected = found.get_submodule(name).dequantize(torch.bfloat16)  # type: ignore[operator]
    decoded = dequantize_4bit(codes, state).view(expected.shape)
    return float((decoded.float() - expected.float()).abs().max())


@torch.no_grad()
def measured_table(
    arguments: argparse.Namespace, domains: dict[str, str], models: dict[str, Any]
) -> dict[str, dict[str, dict[str, float]]]:
    """domain -> base -> KL from fp32, perplexity, and how often the likeliest token is the same."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_folder(arguments.model)
    logits: dict[str, Logits] = {"fp32": lambda ids: exact(ids).logits} | models
    table = {}
    for domain, text in domains.items():
        ids = torch.tensor(tokenizer.encode(texts.measured(text)[: arguments.chunks * CHUNK * 8]))
        chunks = ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK)[: arguments.chunks]
        table[domain] = _domain(chunks, logits)
        print(domain, table[domain], flush=True)
    return table


def _domain(chunks: Tensor, logits: dict[str, Logits]) -> dict[str, dict[str, float]]:
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in logits}
    for ids in chunks:
        exact = None
        for name, of in logits.items():
            found = of(ids[None])[0].log_softmax(-1)
            exact = found if exact is None else exact
            loss = -found[:-1].gather(1, ids[1:, None]).sum()
            same = (found.argmax(-1) == exact.argmax(-1)).sum()
            sums[name] += torch.stack([(exact.exp() * (exact - found)).sum(), loss, same]).double()
    tokens, predicted = chunks.numel(), chunks.numel() - len(chunks)
    return {
        name: {
            "KL": round(of[0].item() / tokens, 4),
            "perplexity": round(math.exp(of[1].item() / predicted), 3),
            "same_token": round(of[2].item() / tokens, 4),
        }
        for name, of in sums.items()
    }


def bounds(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, bool]:
    """Whether each holds."""
    checks = {}
    for name, most in MOST_KL.items():
        worst = max(of[name]["KL"] / of["nearest"]["KL"] for of in table.values())
        checks[f"KL of {name}: {worst:.3f} of nearest's at most, <= {most}"] = worst <= most
    prose = {name: of["perplexity"] for name, of in table["prose"].items()}
    gap = (prose["compensated"] - prose["fp32"]) / (prose["nearest"] - prose["fp32"])
    return checks | {f"gap of perplexity on prose: {gap:.3f} of nearest's, <= {MOST_GAP}": gap <= MOST_GAP}
