"""Tiny random checkpoints in Hugging Face's format, written for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qsharded.models import CausalLM, ModelConfig

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(folder: Path, *, shards: int = 1, seed: int = 0, **config: Any) -> Path:
    """Write config.json and random bf16 weights, in one file or in ``shards`` of them with an index."""
    described = LLAMA | config
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig.from_hf(described), dtype=torch.bfloat16)
    weights = {name: (p.detach() + 0.05 * torch.randn_like(p)) for name, p in model.named_parameters()}
    (folder / "config.json").write_text(json.dumps(described))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(folder, weights, shards)
    return folder


def _write_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    names, index = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
