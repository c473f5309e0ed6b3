"""Other libraries' QLoRA steps on the same case, where they are installed.

python -P peers.py NAME CASE.json RESULT.json MODELS    # as a file, from a folder that holds no module called kernels

They are started so since Hugging Face ships a package of that name, which transformers, bitsandbytes and Unsloth
import; -P keeps the modules beside this one from hiding others. MODELS keeps a random checkpoint of each shape for the
next case.
"""

import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("unsloth", "transformers")
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CHECKPOINTS = ("full", "offloaded")
_WARM_UP = 3


def main() -> None:
    name, case = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    build = {"unsloth": _unsloth, "transformers": _transformers}[name]
    Path(sys.argv[3]).write_text(json.dumps(measure(build, case, Path(sys.argv[4]))))


def measure(build: Any, case: dict[str, Any], models: Path) -> dict[str, Any]:
    """As ``ours.measure``, without a profile."""
    folder = models / hashlib.sha256(json.dumps(case["shape"], sort_keys=True).encode()).hexdigest()[:16]
    if not folder.exists():
        _write_random_model(case["shape"], folder)
    model = build(case, str(folder))
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU shows that it runs, no more
    accelerator = torch.get_device_module(device)
    optimizer = _optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(4, case["shape"]["vocab_size"] - 4, (case["rows"], case["length"]), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    walls = []
    for _ in range(_WARM_UP + case["steps"]):
        accelerator.synchronize()
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.synchronize()
        walls.append(time.perf_counter() - began)
    result = {"step_ms": 1e3 * statistics.median(walls[_WARM_UP:]), "first_step_s": walls[0]}
    if device.type == "cuda":
        result["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def _optimizer(parameters: list[Any]) -> Any:
    import bitsandbytes
    import torch

    made = bitsandbytes.optim.PagedAdamW8bit if torch.cuda.is_available() else torch.optim.AdamW
    return made(parameters, lr=1e-4)


def _write_random_model(shape: dict[str, Any], folder: Path) -> None:
    """A checkpoint with a tokenizer of words, in a process of its own: what it leaves on the GPU goes with it."""
    if os.fork():
        assert os.wait()[1] == 0, "the random checkpoint could not be written"
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = {name: value for name, value in shape.items() if name != "architectures"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(LlamaConfig(**names, bos_token_id=0, eos_token_id=1, pad_token_id=2)).save_pretrained(folder)
    special = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    words = special | {f"w{number}": number for number in range(4, shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    os._exit(0)


def _unsloth(case: dict[str, Any], folder: str) -> Any:
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_DISABLE_AUTO_UPDATES": "1"}
    from unsloth import FastLanguageModel

    length = case["length"]
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=length, dtype=None, load_in_4bit=True)
    checkpointing = "unsloth" if case["checkpointing"] in _CHECKPOINTS else False
    adapters = {"r": case["rank"], "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "target_modules": _TARGETS}
    model = FastLanguageModel.get_peft_model(model, **adapters, use_gradient_checkpointing=checkpointing)
    FastLanguageModel.for_training(model)
    return model


def _transformers(case: dict[str, Any], folder: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = 0 if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"quantization_config": nf4, "dtype": torch.bfloat16, "device_map": {"": device}}
    base = AutoModelForCausalLM.from_pretrained(folder, **settings)
    adapters = LoraConfig(r=case["rank"], lora_alpha=16, target_modules=_TARGETS, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, adapters, autocast_adapter_dtype=False)
    model.config.use_cache = False
    if case["checkpointing"] in _CHECKPOINTS:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


if __name__ == "__main__":
    main()
