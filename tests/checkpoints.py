"""Tiny random checkpoints in Hugging Face's format, written for tests."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import torch
from safetensors.torch import load_file, save_file

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


def packed_by_bitsandbytes(
    name: str, weight: torch.Tensor, quant_type: str, block_size: int, nested: bool, storage: torch.dtype = torch.uint8
) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores for one weight."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, None, None, block_size, nested, quant_type, storage)
    # frombuffer in as_dict gives tensors that share memory
    return {name: codes} | {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}


def pack_by_bitsandbytes(
    folder: Path, target: Path, quant_type: str, block_size: int, nested: bool, *, torn_rows: bool = False
) -> Path:
    """The checkpoint in ``folder``, in one file, with its projections packed by bitsandbytes' own functions: those
    whose rows are whole blocks, or with ``torn_rows`` all. transformers gives bitsandbytes no block size, so cannot."""
    weights, described = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    skipped = ["lm_head"]
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        if torn_rows or weights[name].shape[1] % block_size == 0:
            weights |= packed_by_bitsandbytes(name, weights[name], quant_type, block_size, nested)
        else:
            skipped.append(name.removesuffix(".weight"))
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": quant_type}
    said |= {"bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": skipped}
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(described | {"quantization_config": said}))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write_chat_checkpoint(folder: Path, **config: Any) -> Path:
    """A checkpoint with a tokenizer of single characters and a chat template."""
    return write_checkpoint(folder, **{"vocab_size": write_chat_tokenizer(folder)} | config)


def write_chat_tokenizer(folder: Path) -> int:
    """The tokenizer; returns how many tokens it has."""
    specials = ["<pad>", "<e>", "<u>", "<a>", "<s>"]
    vocabulary = {token: i for i, token in enumerate(specials + [chr(code) for code in range(32, 124)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<e>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def write_chat_rows(path: Path, count: int) -> Path:
    """Conversations that a tiny model can learn: the answer repeats one of five letters of the question."""
    rows = [
        {"messages": [{"role": "user", "content": x * (1 + i % 4)}, {"role": "assistant", "content": x * 3}]}
        for i, x in enumerate("abcde"[i % 5] for i in range(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
