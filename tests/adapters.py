"""Random adapters and checkpoints in other dtypes, for tests; PEFT writes the adapters."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config
from qsharded.quant import formats


def transformers_model(checkpoint: Path, dtype: Any = "auto") -> PreTrainedModel:
    """The checkpoint as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def write_adapter(folder: Path, checkpoint: Path, **config: Any) -> Path:
    """An adapter by PEFT for ``checkpoint``, with random values large enough to change what the model says."""
    torch.manual_seed(3)
    described = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(transformers_model(checkpoint), LoraConfig(**described | config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def recast(checkpoint: Path, dtype: torch.dtype) -> Path:
    """Rewrite a checkpoint's weights in ``dtype``."""
    for path in checkpoint.glob("*.safetensors"):
        save_file({name: w.to(dtype) for name, w in load_file(path).items()}, path, metadata={"format": "pt"})
    config = (checkpoint / "config.json").read_text().replace('"bfloat16"', f'"{str(dtype).split(".")[1]}"')
    (checkpoint / "config.json").write_text(config)
    return checkpoint


def round_to_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """Give every linear layer but the head the weights that it has in NF4."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = formats.quantize(layer.weight.data).dequantize(layer.weight.dtype)
    return model


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Our model's, or those of transformers'."""
    with torch.no_grad():
        said = model(ids)
    return getattr(said, "logits", said)


def with_adapter(checkpoint: Path, adapter: Path) -> Any:
    """Our model in fp32 on the CPU, with the adapter of a folder."""
    model = load_model(checkpoint, lora=read_lora_config(adapter), dtype=torch.float32, device="cpu")
    load_adapter(model, adapter)
    return model
