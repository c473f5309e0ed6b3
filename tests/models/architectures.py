"""Tiny random checkpoints of transformers' architectures, and what transformers and PEFT compute of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.load import checkpoint_name
from qsharded.data import Batch
from qsharded.models import CausalLM
from qsharded.nn import LoRAConfig, NF4Linear
from qsharded.quant import formats
from qsharded.quant.experts import PackedExperts
from qsharded.utils.documents import IGNORE
from tests.models.architecture_list import ARCHITECTURES

VOCAB = 61
LORA = LoRAConfig(r=4, lora_alpha=12)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def described_by(model_type: str, **config: Any) -> dict[str, Any]:
    """A tiny one's config.json."""
    of_its_own = ARCHITECTURES[model_type].config if model_type in ARCHITECTURES else {}
    return {"model_type": model_type, **_SHAPE, **of_its_own, **config}


def write_architecture(folder: Path, model_type: str, **config: Any) -> Path:
    """A checkpoint as transformers writes it, in fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described_by(model_type, **config))).float()
    for parameter in model.parameters():  # norms, biases and sinks are not to be ones and zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def write_random_adapter(model: CausalLM, folder: Path, lora: LoRAConfig = LORA) -> None:
    """Give the adapters of ``model`` values that show in its logits, and save them."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(model):
        parameter.data.normal_(std=0.1, generator=generator)
    save_adapter(model, lora, folder, base_model="base")


def documents(packed: bool) -> list[list[Tensor]]:
    """Two rows of 16 tokens: of two documents each, or of one."""
    generator = torch.Generator().manual_seed(2)
    lengths = [(7, 9), (5, 11)] if packed else [(16,), (16,)]
    return [[torch.randint(VOCAB, (length,), generator=generator) for length in row] for row in lengths]


def batch_of(rows: Sequence[Sequence[Tensor]]) -> Batch:
    """Those rows as training sees them."""
    ids = [torch.cat(list(row)) for row in rows]
    targets = [torch.cat([_targets(document) for document in row]) for row in rows]
    positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
    numbers = [torch.cat([torch.full((len(d),), number) for number, d in enumerate(row)]) for row in rows]
    document_ids = torch.stack(numbers) if len(rows[0]) > 1 else None
    return Batch(torch.stack(ids), torch.stack(targets), torch.stack(positions), document_ids)


def _targets(document: Tensor) -> Tensor:
    return torch.cat((document[1:], torch.tensor([IGNORE])))


def computed_by(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V], and the loss, whose backward is done."""
    rows: dict[str, Any] = {"positions_BS": batch.positions, "document_ids_BS": batch.document_ids}
    with torch.no_grad():
        logits = model(batch.input_ids, **rows)
    loss = model(batch.input_ids, **rows, targets_BS=batch.targets)
    loss.backward()
    return logits, loss.detach()


def gradients(model: CausalLM) -> dict[str, Tensor]:
    """Of what trains, by its name in an adapter file."""
    return {name: p.grad for name, p in trainable(model) if p.grad is not None}


def computed_by_peft(
    checkpoint: Path, adapter: Path, packed: set[str], rows: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of transformers and PEFT, each document by itself, with the layers ``packed`` as they
    are after quantization."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    round_packed(base, packed)
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()
    logits = [[model(input_ids=document[None], use_cache=False).logits[0] for document in row] for row in rows]
    pairs = [
        (of, _targets(document))
        for row, made in zip(rows, logits, strict=True)
        for document, of in zip(row, made, strict=True)
    ]
    loss = torch.stack(
        [F.cross_entropy(of, targets, ignore_index=IGNORE, reduction="sum") for of, targets in pairs]
    ).sum()
    loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack([torch.cat(made) for made in logits]).detach(), loss.detach(), grads


def packed_weights(model: CausalLM) -> set[str]:
    """The names of the packed weights in the checkpoint; of experts, in our own form."""
    layers = {name for name, module in model.named_modules() if isinstance(module, NF4Linear | PackedExperts)}
    return {checkpoint_name(f"{name}.weight") for name in layers}


def round_packed(base: PreTrainedModel, packed: Iterable[str]) -> None:
    """Give transformers' model the values that the weights ``packed`` have in NF4."""
    for name in packed:
        parent, _, part = name.removesuffix(".weight").rpartition(".")
        for weight in matrices_of(base.get_submodule(parent), part) if parent.endswith(".experts") else [name]:
            values = base.get_parameter(weight).data if isinstance(weight, str) else weight
            values.copy_(formats.quantize(values.contiguous()).dequantize(torch.float32))


def matrices_of(experts: Any, part: str) -> list[Tensor]:
    """Views [N, K] of one projection of each of transformers' experts."""
    stored = experts.down_proj if part == "down_proj" else experts.gate_up_proj
    turned = list(stored.data.transpose(1, 2) if experts.is_transposed else stored.data)
    if part == "down_proj":
        return turned
    half = ("gate_proj", "up_proj").index(part)
    return [matrix.chunk(2)[half] if experts.is_concatenated else matrix[half::2] for matrix in turned]


def assert_parity(found: Tensor, expected: Tensor, what: str) -> None:
    """max|a - b| <= 1e-5 max|b|."""
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= 1e-5, f"{what}: {error:.1e}"
