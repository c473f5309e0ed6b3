"""A tiny checkpoint of a variant with an adapter that PEFT wrote, and what transformers and PEFT compute of them.

The base is the dequantized NF4 of the checkpoint: qsharded packs the same weights.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, read_lora_config, trainable
from qsharded.models import CausalLM
from qsharded.quant import formats
from qsharded.utils.sharding import whole
from tests.models.variants import VARIANTS, VOCAB

ROWS, LENGTH = 2, 21  # longer than the windows, and than the original length of a stretched rotary embedding
# fp32 sums in another order; a recurrence carries its rounding on, and one processor was seen at 1.2e-5
TOLERANCE, OF_RECURRENCES = 1e-5, 2e-5

EXPERTS, TAKEN = ("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A variant's folders, what transformers and PEFT make of ``ids`` (logits, loss and gradients by name), and its
    config.json as the installed transformers writes it again."""

    checkpoint: Path
    adapter: Path
    expected: Result
    rewritten: dict[str, Any]


_folders = TemporaryDirectory()


@cache
def case(variant: str) -> Case:
    checkpoint, adapter = (Path(_folders.name, variant, kind) for kind in ("base", "adapter"))
    model, rewritten = write_checkpoint(checkpoint, VARIANTS[variant])
    peft = write_adapter(round_to_nf4(model), adapter)
    return Case(checkpoint, adapter, results_of_peft(peft), rewritten)


def ids() -> Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def write_checkpoint(folder: Path, described: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' random model of a config.json, saved with that very config.json; and transformers' own of it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if "text_config" in described else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(parameter.dim() == 1 and "bias" not in name and not is_offset(model, name))
            parameter.normal_(mean=centre, std=0.2 if parameter.dim() == 1 else 0.12)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.save_pretrained(folder)
    rewritten = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described))
    return model, rewritten


def is_offset(model: nn.Module, name: str) -> bool:
    """Whether a norm's weight is an offset from 1."""
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ in (
        "Gemma2RMSNorm",
        "Gemma3RMSNorm",
        "Qwen3_5RMSNorm",
        "Qwen3_5MoeRMSNorm",
        "Qwen3NextRMSNorm",
    )


def is_of_decoder(name: str) -> bool:
    """Whether a module or tensor is of the decoder's layers."""
    return ".layers." in name and "vision" not in name and "visual" not in name


def round_to_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """With the weights that the decoder's linear layers have in NF4."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and is_of_decoder(name):
            layer.weight.data = formats.quantize(layer.weight.data).dequantize(torch.float32)
        if name.endswith(".experts"):
            round_experts(layer)
    return model


def round_experts(experts: nn.Module) -> None:
    """transformers' experts of a layer: gate, up and down of each are matrices by themselves."""
    turned = getattr(experts, "is_transposed", False)
    for name in ("gate_up_proj", "down_proj"):
        for stored in experts.get_parameter(name).data:
            matrix = stored.T if turned else stored
            halves = [matrix[::2], matrix[1::2]] if turned else list(matrix.chunk(2))
            for part in halves if name == "gate_up_proj" else [matrix]:
                part.copy_(formats.quantize(part.contiguous()).dequantize(torch.float32))


def write_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """By PEFT, on every linear layer of the decoder."""
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_of_decoder(name)]
    parameters = parameters_of_experts(model, linears)
    named = {name.rpartition(".")[2] for name in linears} - (set(TAKEN) if parameters else set())
    targets: str | list[str] = sorted(named)
    if any("language_model" in name for name, _ in model.named_modules()):
        targets = rf".*\.language_model\..*\.({'|'.join(targets)})"
    lora = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, target_parameters=parameters or None, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, lora)
    torch.manual_seed(3)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1 if "lora_A" in name else 0.05)
    peft.save_pretrained(folder)
    return peft.eval()


def parameters_of_experts(model: PreTrainedModel, linears: list[str]) -> list[str]:
    """The parameters to adapt in a mixture; PEFT takes linear layers of some names for the experts', and so they are
    named as parameters too."""
    mixtures = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    taken = [f"{name}.weight" for name in linears if name.rpartition(".")[2] in TAKEN]
    names = [f"{name}.{part}" for name in mixtures for part in EXPERTS] + (taken if mixtures else [])
    return sorted({name.partition(".layers.")[2].partition(".")[2] for name in names})


def results_of_peft(peft: PeftModel) -> Result:
    """Logits, loss and gradients of :func:`ids`; the adapter's tensors are called as in its file."""
    out = peft(input_ids=ids(), labels=ids())
    out.loss.backward()
    gradients = {name.replace(".default.", "."): p.grad for name, p in peft.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


@cache
def load(variant: str) -> CausalLM:
    """Our model of the variant, packed, with the adapter."""
    folders = case(variant)
    return load_folders(folders.checkpoint, folders.adapter)


def load_folders(checkpoint: Path, adapter: Path, **options: Any) -> CausalLM:
    """Our model, packed, with an adapter that PEFT wrote; ``options`` are those of ``load_model``."""
    lora = read_lora_config(adapter)
    model = load_model(checkpoint, lora=lora, dtype=torch.float32, device="cpu", **options)
    load_adapter(model, adapter)
    return model


def results(model: CausalLM, rows: slice = slice(None), world_size: int = 1) -> Result:
    """Logits and loss of some rows of :func:`ids`, and the gradients of the loss over all of them."""
    mine = ids()[rows]
    with torch.no_grad():
        logits = model(mine)
    targets = torch.cat((mine[:, 1:], torch.full_like(mine[:, :1], -100)), dim=1)
    loss = model(mine, targets_BS=targets) / (ROWS * (LENGTH - 1))
    model.zero_grad()
    (loss * world_size).backward()  # FSDP2 averages over ranks
    gradients = {name: whole(p.grad) for name, p in trainable(model)}
    return {"logits": logits, "loss": loss.detach(), **gradients}


def assert_close(got: Result, expected: Result) -> None:
    """Each tensor's largest error is a hundred thousandth of its largest value at most, in recurrent layers two."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, size = (got[name] - value).abs().max().item(), value.abs().max().item()
        assert size > 0, name
        tolerance = OF_RECURRENCES if ".linear_attn." in name else TOLERANCE
        assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"
