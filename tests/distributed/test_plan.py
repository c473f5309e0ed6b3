"""Planned bytes of what a rank holds, against real models of every family on 1, 2 and 3 ranks, to the last byte."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

from qsharded.checkpoint.load import load_model, skeleton
from qsharded.distributed.choose_layout import SHARDED, Layout
from qsharded.distributed.exact_all_gather import ExactAllGather
from qsharded.distributed.world import start_world
from qsharded.models import ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.optim import PagedAdamW8bit
from qsharded.plan.optimizer import state_bytes
from qsharded.plan.parameters import ADAPTERS, CODES, EMBEDDING, OTHERS, SCALES, UNPACKED, parameters
from qsharded.utils.sharding import local
from tests.checkpoints import LLAMA
from tests.distributed.harness import run_ranks

# Rows that 2 and 3 ranks cut unevenly, 3 blocks a row, a K that is no multiple of 64 and so stays in 16 bits.
_ODD = LLAMA | {"vocab_size": 97, "hidden_size": 192, "intermediate_size": 200, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _ODD,
    "llama-tied-biased": _ODD | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": _ODD | {"model_type": "mistral", "architectures": None, "sliding_window": 7},
    "qwen2": _ODD | {"model_type": "qwen2", "architectures": None, "tie_word_embeddings": True},
    "qwen3": _ODD | {"model_type": "qwen3", "architectures": None},
    "one-row-a-rank": _ODD | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 2},
}
LORAS = {
    "float32": LoRAConfig(r=5),
    "bfloat16": LoRAConfig(r=3, dtype=torch.bfloat16, target_modules=["q_proj", "down_proj"]),
    "embedding": LoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "trained-head": LoRAConfig(r=4, modules_to_save=["lm_head", "norm"]),
}


LAYOUTS = {"sharded": SHARDED, "replicated": Layout(replicated=True), "on host": Layout(on_host=True)}
Case = tuple[str, str, str]


def cases() -> list[Case]:
    """Every configuration with the common adapters; each kind of adapters; each layout, tied and not."""
    return [
        *((config, "float32", "sharded") for config in CONFIGS),
        *(("llama", lora, "sharded") for lora in LORAS if lora != "float32"),
        *((config, "float32", layout) for layout in ("replicated", "on host") for config in ("qwen2", "qwen3")),
    ]


def classes_held(folder: Path) -> dict[Case, dict[str, int]]:
    """Bytes by class that this rank really holds, with its gradients and optimizer state, in every case."""
    world = start_world()
    mesh = init_device_mesh("cpu", (world.size,)) if world.size > 1 else None
    return {case: held(folder / case[0], LORAS[case[1]], LAYOUTS[case[2]], mesh) for case in cases()}


def held(folder: Path, lora: LoRAConfig, layout: Layout, mesh: Any) -> dict[str, int]:
    recompute = {"activation_checkpointing": "full"} if layout.on_host else {}
    model = load_model(folder, mesh=mesh, lora=lora, layout=layout, random_init=True, **recompute)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, in_8_bits = AdamW(trained), PagedAdamW8bit(trained)
    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    buffers, allocate = [], ExactAllGather.allocate

    def counting(self: Any, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffers.append(size[0] * dtype.itemsize)
        return allocate(self, size, dtype=dtype, device=device)

    ExactAllGather.allocate = counting
    model(ids, targets_BS=ids).backward()
    ExactAllGather.allocate = allocate
    optimizer.step()
    in_8_bits.step()
    store = in_8_bits._store
    return {
        **by_class(model),
        "gradients": sum(local(p.grad).nbytes for p in trained),
        "adamw": sum(local(optimizer.state[p][key]).nbytes for p in trained for key in _AVERAGES),
        "adamw8bit": store.device_bytes + store._small.arena.device_bytes + store.steps.nbytes,
        "largest gather": max(buffers, default=0),
    }


_AVERAGES = ("exp_avg", "exp_avg_sq")


def by_class(model: torch.nn.Module) -> Counter[str]:
    """By names alone: beside a packed weight there is its absmax."""
    found: Counter[str] = Counter()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            kind = ADAPTERS
        elif "absmax" in name:
            kind = SCALES
        elif f"{name}_absmax" in tensors:
            kind = CODES
        elif "embed_tokens" in name or name.startswith("lm_head"):
            kind = EMBEDDING
        else:
            kind = UNPACKED if name.endswith("_proj.weight") or name.endswith("base_layer.weight") else OTHERS
        found[kind] += local(tensor).nbytes
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shapes")
    for name, config in CONFIGS.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_planned_bytes_are_those_of_the_real_model(folder: Path, ranks: int) -> None:
    found = run_ranks(classes_held, ranks, folder)
    for case in cases():
        config, lora, layout = ModelConfig.from_hf(CONFIGS[case[0]]), LORAS[case[1]], LAYOUTS[case[2]]
        model = skeleton(config, lora, torch.bfloat16)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for rank, real in enumerate(found):
            planned = parameters(model, ranks=ranks, rank=rank, layout=layout, param_dtype=torch.bfloat16)
            frozen = sum(planned.resident.values()) - planned.resident[ADAPTERS] + planned.on_host
            assert sum(real[case].get(kind, 0) for kind in _FROZEN) == frozen, (case, rank)
            expected = {key: size for key, size in planned.resident.items() if not planned.on_host or key == ADAPTERS}
            expected |= {"gradients": planned.resident[ADAPTERS]}
            expected |= {kind: state_bytes(trained, kind, ranks=ranks, rank=rank) for kind in ("adamw", "adamw8bit")}
            assert {key: real[case].get(key, 0) for key in expected} == expected, (case, rank)
            assert real[case]["largest gather"] == max(planned.layer, planned.vocabulary), (case, rank)


_FROZEN = (CODES, SCALES, EMBEDDING, UNPACKED, OTHERS)


def test_rank_0_holds_the_most(folder: Path) -> None:
    model = skeleton(ModelConfig.from_hf(CONFIGS["llama"]), LORAS["float32"], torch.bfloat16)
    held = [sum(parameters(model, ranks=3, rank=rank).resident.values()) for rank in range(3)]
    assert held == sorted(held, reverse=True)
    assert held[0] > held[2]
