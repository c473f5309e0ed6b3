"""Tiny random transformers models of every family, and our model of the same checkpoint."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qsharded.models import CausalLM, ModelConfig

VOCAB = 61
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 256}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

# What each family adds to the shape, in the spelling of transformers 5.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "llama-tied-biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "llama-dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama-yarn": {"model_type": "llama", "rope_parameters": _YARN},
    "llama-yarn-every-key": {
        "model_type": "llama",
        "rope_parameters": {
            **_YARN,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2", **_QWEN_WINDOW},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": {**_YARN, "attention_factor": 1.2}},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "qwen3-layer-types": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm2": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 36,
    },
}


@cache
def pair(family: str) -> tuple[PreTrainedModel, CausalLM]:
    """transformers' model of a family with random fp32 weights, and ours of the folder that it saves."""
    theirs = transformers_model(_SHAPE | FAMILIES[family])
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        state = load_file(Path(folder, "model.safetensors"))
    return theirs, our_model(config, state)


def transformers_model(config: dict[str, Any]) -> PreTrainedModel:
    """A model of this config.json with weights so large that every part of it shows in the logits."""
    torch.manual_seed(0)
    settings = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.25)
    return model.eval()


def our_model(config: dict[str, Any], state: dict[str, Tensor]) -> CausalLM:
    """Our fp32 model of a config.json and state dict, each tensor of which has to find its place."""
    model = CausalLM(ModelConfig.from_hf(config), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    assert not unexpected
    assert missing in ([], tied)
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
