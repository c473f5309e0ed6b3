"""Calibrating random weights in the shape of large models: seconds a layer, and memory."""

import argparse
import json
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qsharded.calibration.checkpoint import calibrate_checkpoint
from qsharded.calibration.column_loop import round_columns_by_reference, round_columns_by_triton
from qsharded.calibration.method import Calibration
from qsharded.calibration.rows import CalibrationRows
from qsharded.cli.command import compute_dtype
from qsharded.distributed.world import World, start_world, stop_world
from qsharded.quant.formats import NF4_64

_COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 5e5}
_COMMON |= {"hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 8192}
_MIXTURE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "30b-a3b": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32}
    | {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "intermediate_size": 6144, **_MIXTURE},
    "106b-a12b": {
        "hidden_size": 4096,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
    }
    | {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "intermediate_size": 10944, **_MIXTURE},
    "tiny-mixture": {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 192, **_MIXTURE},
    "tiny": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
}
MOST_MINUTES = {"8b": 6.0, "70b": 30.0}  # 8b: one H200; 70b: two
MOST_HOST_GIB = 24.0
_VOCABULARY = {"8b": 128256, "70b": 128256, "30b-a3b": 151936, "106b-a12b": 151552}
_TINY_VOCABULARY = 256
_GIB = 1 << 30


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any] | None, dict[str, bool]]:
    """The figures, and whether each bound holds; of ranks the main one's alone."""
    world = start_world()
    length = arguments.length or 2048
    with tempfile.TemporaryDirectory() as scratch:
        path = [Path(scratch)]
        if world.size > 1:
            torch.distributed.broadcast_object_list(path, src=0)
        if world.is_main:
            write_checkpoint(path[0], arguments.shape, arguments.layers, world.device)
        world.barrier()
        seconds = calibrated(path[0], arguments, length, world)
        world.barrier()
    is_main, found = world.is_main, _figures(arguments, length, world, seconds)
    stop_world(world)
    return found if is_main else (None, {})


def _figures(
    arguments: argparse.Namespace, length: int, world: World, seconds: float
) -> tuple[dict[str, Any], dict[str, bool]]:
    layers = SHAPES[arguments.shape]["num_hidden_layers"]
    minutes = seconds / arguments.layers * layers / 60
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
    record = {
        "shape": arguments.shape,
        "rows": arguments.rows,
        "length": length,
        "ranks": world.size,
        "layers_measured": arguments.layers,
        "seconds_measured": round(seconds, 1),
        "minutes_of_the_model": round(minutes, 2),
        "host_gib_of_a_rank": round(host, 2),
    }
    if world.device.type == "cuda":
        record["gpu_gib_allocated"] = round(torch.cuda.max_memory_allocated() / _GIB, 2)
    most = MOST_MINUTES.get(arguments.shape, math.inf)
    checks = {
        f"{minutes:.1f} minutes, <= {most}": minutes <= most,
        f"{host * world.size:.1f} GiB of host memory, <= {MOST_HOST_GIB}": host * world.size <= MOST_HOST_GIB,
        "the kernel's codes and errors are the reference's": kernel_is_exact(world.device),
    }
    return record, checks


def calibrated(folder: Path, arguments: argparse.Namespace, length: int, world: World) -> float:
    """Seconds from reading the first layer to the last one's end."""
    generator = torch.Generator().manual_seed(0)
    ids_RS = torch.randint(
        _VOCABULARY.get(arguments.shape, _TINY_VOCABULARY), (arguments.rows, length), generator=generator
    )
    rows = CalibrationRows(ids_RS, {"random": arguments.rows})
    how = Calibration("compensated", NF4_64, world.group)
    dtype = compute_dtype("auto", world.device)
    begun = time.perf_counter()
    calibrate_checkpoint(folder, rows, how, folder / "layers", world.device, dtype)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def write_checkpoint(folder: Path, shape: str, layers: int, device: torch.device) -> None:
    """A Llama or Qwen3 MoE of that shape with so many layers, in bf16, a file each."""
    kv_heads = 2 if shape.startswith("tiny") else 8
    described: dict[str, Any] = _COMMON | SHAPES[shape] | {"num_hidden_layers": layers, "num_key_value_heads": kv_heads}
    described |= {"vocab_size": _VOCABULARY.get(shape, _TINY_VOCABULARY)}
    (folder / "config.json").write_text(json.dumps(described))
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator).cpu()

    D, V = described["hidden_size"], described["vocab_size"]
    ends = {"model.embed_tokens.weight": drawn(V, D), "lm_head.weight": drawn(V, D)}
    index = _save(folder, "ends", ends | {"model.norm.weight": torch.ones(D, dtype=torch.bfloat16)})
    for layer in range(layers):
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in _layer(described, drawn).items()}
        index |= _save(folder, f"layer-{layer}", named)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _layer(described: dict[str, Any], drawn: Any) -> dict[str, Tensor]:
    D, heads = described["hidden_size"], described["num_attention_heads"]
    head = described.get("head_dim", D // heads)
    Q, E = head * heads, head * described["num_key_value_heads"]
    sizes = {"q": (Q, D), "k": (E, D), "v": (E, D), "o": (D, Q)}
    tensors = {f"self_attn.{name}_proj.weight": drawn(*size) for name, size in sizes.items()}
    norms: dict[str, int] = {"input_layernorm": D, "post_attention_layernorm": D}
    if "num_experts" in described:
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
        tensors["mlp.gate.weight"] = drawn(described["num_experts"], D)
        for expert in range(described["num_experts"]):
            tensors |= _mlp(f"mlp.experts.{expert}", D, described["moe_intermediate_size"], drawn)
    else:
        tensors |= _mlp("mlp", D, described["intermediate_size"], drawn)
    return tensors | {f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}


def _mlp(name: str, D: int, F: int, drawn: Any) -> dict[str, Tensor]:
    sizes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return {f"{name}.{part}_proj.weight": drawn(*size) for part, size in sizes.items()}


def _save(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    return dict.fromkeys(tensors, f"{name}.safetensors")


def kernel_is_exact(device: torch.device) -> bool:
    """On a block as large as one of an 8B model. Without a GPU there is Triton's interpreter alone, which tests try."""
    if device.type != "cuda":
        return True
    generator = torch.Generator(device).manual_seed(1)
    block = torch.randn(14336, 64, device=device, generator=generator)
    scales = block.abs().amax(1) * torch.where(torch.arange(14336, device=device) % 2 == 0, 0.95, -1.03)
    U = (torch.eye(64, device=device) + 0.1 * torch.randn(64, 64, device=device, generator=generator)).triu()
    one, other = (by(block, scales, U, NF4_64) for by in (round_columns_by_reference, round_columns_by_triton))
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
