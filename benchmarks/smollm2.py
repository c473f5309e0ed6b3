"""The whole path on a real model, against transformers, PEFT and bitsandbytes, on a CPU.

    python -m benchmarks.smollm2 --model SMOLLM2_FOLDER --text TEXT_FILE

Give the folder of a SmolLM2-135M-Instruct checkpoint and a text file (WikiText-2). It measures perplexity in NF4 with
double quantization here and with transformers + bitsandbytes on the same chunks; trains 60 steps on two ranks; loads
the adapter by PEFT onto transformers' model and compares logits; merges, and loads the merged folder in transformers.
The record is written to --record; the exit status is 1 where one of the checks fails.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import environment, write
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.data import Tokenizer
from qsharded.report.run_files import read_metrics

CHUNK = 1024
LARGEST_PERPLEXITY_GAP = 0.005  # relative to transformers + bitsandbytes
LARGEST_FP32_ERROR = 1e-4  # relative, of logits: sums in another order through 30 layers

Logits = Callable[[Tensor], Tensor]


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        record = environment() | {
            "command": "python -m " + " ".join(["benchmarks.smollm2", *sys.argv[1:]]),
            "perplexity": perplexities(arguments),
            "training": training(arguments, Path(scratch)),
            "adapter_in_peft": adapter_in_peft(arguments, Path(scratch)),
            "merged": merged(arguments, Path(scratch)),
        }
    write(arguments.record, record)
    print(json.dumps(record, indent=2))
    sys.exit(not passed(record))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the SmolLM2 checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="plain text, such as WikiText-2")
    parser.add_argument("--tokens", type=int, default=16384, help="how many tokens perplexity is measured on")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/smollm2.json"))
    return parser.parse_args()


def passed(record: dict[str, Any]) -> bool:
    """Whether every check of the record holds."""
    losses = record["training"]["validation_loss"]
    # Two models that round bf16 in another order may lie as far apart as either lies from fp32.
    allowed = 2 * record["adapter_in_peft"]["bf16_rounding"]
    checks = {
        "perplexity as with bitsandbytes": record["perplexity"]["relative_gap"] < LARGEST_PERPLEXITY_GAP,
        "validation loss falls": losses[-1] < losses[0],
        "PEFT gives our logits in fp32": record["adapter_in_peft"]["fp32_error"] < LARGEST_FP32_ERROR,
        "PEFT gives our logits in bf16": record["adapter_in_peft"]["bf16_error"] < allowed,
        "the adapter matters": record["adapter_in_peft"]["effect"] > 10 * allowed,
        "transformers gives them with the merged model": record["merged"]["bf16_error"] < allowed,
    }
    for name, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {name}")
    return all(checks.values())


def perplexities(arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity here and with transformers + bitsandbytes, both NF4 with double quantization and fp32 arithmetic."""
    ids = text_ids(arguments)
    ours = perplexity(load_model(arguments.model, dtype=torch.float32, device="cpu").eval(), ids)
    theirs = perplexity(logits_of(bitsandbytes_model(arguments.model)), ids)
    unquantized = perplexity(logits_of(transformers_model(arguments.model, torch.float32)), ids)
    return {
        "tokens": ids.numel(),
        "chunk": CHUNK,
        "qsharded": ours,
        "transformers_bitsandbytes": theirs,
        "transformers_fp32": unquantized,
        "relative_gap": abs(ours - theirs) / theirs,
    }


def text_ids(arguments: argparse.Namespace) -> Tensor:
    text = arguments.text.read_text(encoding="utf-8")
    ids = Tokenizer.from_folder(arguments.model).encode(text[: arguments.tokens * 8])
    return torch.tensor(ids[: arguments.tokens // CHUNK * CHUNK]).view(-1, CHUNK)


@torch.no_grad()
def perplexity(logits: Logits, chunks: Tensor) -> float:
    """exp of the mean loss of each chunk's tokens but the first."""
    losses = [
        torch.nn.functional.cross_entropy(logits(ids[None])[0, :-1].float(), ids[1:], reduction="sum").item()
        for ids in chunks
    ]
    return math.exp(sum(losses) / (chunks.numel() - len(chunks)))


def logits_of(model: Any) -> Logits:
    return lambda ids: model(ids).logits


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def bitsandbytes_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    ).eval()


def training(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Steps of LoRA on two CPU ranks, on text; validation loss before, in between and after."""
    write_rows(arguments.text, scratch)
    command = [
        *("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "qsharded.train"),
        *("--model", str(arguments.model), "--output-dir", str(scratch / "out")),
        *("--dataset", str(scratch / "train.jsonl"), "--eval-dataset", str(scratch / "eval.jsonl")),
        *("--max-steps", str(arguments.steps), "--eval-steps", str(arguments.steps // 2), "--logging-steps", "10"),
        *("--max-length", "128", "--overlong", "truncate", "--packing", "--activation-checkpointing", "none"),
        *("--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "1"),
        *("--learning-rate", "5e-4", "--save-steps", "0"),
    ]
    subprocess.run([sys.executable, "-m", *_as_module(command)], check=True)
    rows = read_metrics(scratch / "out" / "metrics.jsonl")
    return {
        "ranks": 2,
        "steps": arguments.steps,
        "validation_loss": [row["eval_loss"] for row in rows if "eval_loss" in row],
        "training_loss": [row["loss"] for row in rows if "loss" in row],
    }


def _as_module(command: list[str]) -> list[str]:
    """The command with torchrun as a module, for an environment that is not activated."""
    return ["torch.distributed.run", *command[1:]]


def write_rows(text: Path, folder: Path) -> None:
    """Paragraphs as rows: the first for training, some later ones for validation."""
    paragraphs = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 200]
    for name, part in (("train", paragraphs[:400]), ("eval", paragraphs[400:424])):
        rows = (json.dumps({"text": paragraph}) + "\n" for paragraph in part)
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def adapter_in_peft(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Logits with the adapter: PEFT's on transformers' model, which is given our dequantized weights, against ours."""
    from peft import PeftModel

    adapter, ids = scratch / "out" / "adapter", text_ids(arguments)[:2, :256]
    ours, theirs, plain = {}, {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, base = adapted(arguments.model, adapter, dtype), transformers_model(arguments.model, dtype)
        give_dequantized_weights(model, base, dtype)
        with torch.no_grad():
            plain[dtype] = base(ids).logits.float()
            theirs[dtype] = PeftModel.from_pretrained(base, adapter).eval()(ids).logits.float()
            ours[dtype] = model(ids).float()
    return {
        "fp32_error": relative_error(ours[torch.float32], theirs[torch.float32]),
        "bf16_error": relative_error(ours[torch.bfloat16], theirs[torch.bfloat16]),
        "bf16_rounding": relative_error(theirs[torch.bfloat16], theirs[torch.float32]),
        "effect": relative_error(plain[torch.float32], theirs[torch.float32]),
    }


def adapted(model: Path, adapter: Path, dtype: torch.dtype) -> Any:
    ours = load_model(model, lora=read_lora_config(adapter), dtype=dtype, device="cpu").eval()
    load_adapter(ours, adapter)
    return ours


def give_dequantized_weights(ours: Any, base: Any, dtype: torch.dtype) -> None:
    for name, module in packed_layers(ours):
        base.get_submodule(name).weight.data = module.dequantize(dtype)


def packed_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from qsharded.nn import PackedLinear

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name.removesuffix(".base_layer"), module


def merged(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The folder merged onto the NF4 base, in transformers, against the model that was trained."""
    adapter, folder = scratch / "out" / "adapter", scratch / "merged"
    command = ["--model", str(arguments.model), "--adapter", str(adapter), "--output", str(folder), "--base", "nf4"]
    subprocess.run([sys.executable, "-m", "qsharded.merge", *command], check=True)
    ids = text_ids(arguments)[:2, :256]
    with torch.no_grad():
        theirs = transformers_model(folder, torch.bfloat16)(ids).logits.float()
        mine = adapted(arguments.model, adapter, torch.bfloat16)(ids).float()
    return {"bf16_error": relative_error(mine, theirs)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
