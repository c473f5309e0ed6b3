"""Tiny random checkpoints in Hugging Face's format, written for tests."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
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


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write_chat_checkpoint(folder: Path, **config: Any) -> Path:
    """A checkpoint with a tokenizer of single characters and a chat template."""
    specials = ["<pad>", "<e>", "<u>", "<a>", "<s>"]
    vocabulary = {token: i for i, token in enumerate(specials + [chr(code) for code in range(32, 124)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<e>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return write_checkpoint(folder, **{"vocab_size": len(vocabulary)} | config)


def write_chat_rows(path: Path, count: int) -> Path:
    """Conversations that a tiny model can learn: the answer repeats one of five letters of the question."""
    rows = [
        {"messages": [{"role": "user", "content": x * (1 + i % 4)}, {"role": "assistant", "content": x * 3}]}
        for i, x in enumerate("abcde"[i % 5] for i in range(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
