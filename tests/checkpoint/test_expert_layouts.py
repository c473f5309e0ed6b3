"""The layouts in which checkpoints hold experts, read to the same bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qsharded.checkpoint import load_model
from qsharded.checkpoint.expert_fills import experts_in
from qsharded.checkpoint.mxfp4 import decode_mxfp4
from qsharded.quant import formats
from qsharded.quant.experts import PackedExperts
from tests.models.parity import case
from tests.models.variants import VARIANTS

E, J, D = (VARIANTS["qwen3_moe"][key] for key in ("num_experts", "moe_intermediate_size", "hidden_size"))


def experts_of(folder: Path) -> dict[str, PackedExperts]:
    model = load_model(folder, dtype=torch.bfloat16, device="cpu")
    return {name: experts for name, experts in experts_in(model) if isinstance(experts, PackedExperts)}


def rewritten(folder: Path, checkpoint: Path, weights: dict[str, Tensor], **config: object) -> Path:
    shutil.copytree(checkpoint, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | config))
    return folder


def joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of each layer in two tensors, as transformers 5 holds them."""
    rest = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(VARIANTS["qwen3_moe"]["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights[f"{prefix}.{e}.{part}_proj.weight"] for e in range(E)])
            for part in ("gate", "up", "down")
        )
        rest |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}.down_proj": down}
    return rest


def test_an_experts_bytes_are_those_of_its_matrix_whatever_the_layout(tmp_path: Path) -> None:
    checkpoint = case("qwen3_moe").checkpoint
    weights = load_file(checkpoint / "model.safetensors")
    fused = experts_of(rewritten(tmp_path / "joined", checkpoint, joined(weights)))
    for name, experts in experts_of(checkpoint).items():
        parent, _, part = name.rpartition(".")
        for e in range(E):
            alone = formats.quantize(weights[f"{parent}.{e}.{part}.weight"])
            for packed in (experts.packed().expert(e), fused[name].packed().expert(e)):
                assert packed.codes.equal(alone.codes)
                assert packed.absmax.equal(alone.absmax_codes)
                assert packed.absmax_scales.equal(alone.absmax_scales)
                assert packed.absmax_offset.equal(alone.absmax_offset)


def in_mxfp4(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """gpt-oss's tensors with random MXFP4 experts, and the same decoded by transformers."""
    torch.manual_seed(0)
    packed, decoded = dict(weights), dict(weights)
    for name, tensor in weights.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts, K, N = tensor.shape
            blocks = torch.randint(256, (experts, N, K // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, N, K // 32), dtype=torch.uint8)
            del packed[name]
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded[name] = convert_moe_packed_tensors(
                blocks.clone(), scales.clone(), dtype=torch.bfloat16
            ).contiguous()
    return packed, decoded


def test_mxfp4_experts_are_packed_from_their_values(tmp_path: Path) -> None:
    checkpoint = case("gpt_oss").checkpoint
    packed, decoded = in_mxfp4(load_file(checkpoint / "model.safetensors"))
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    of_blocks = experts_of(rewritten(tmp_path / "mxfp4", checkpoint, packed, quantization_config=method))
    of_values = experts_of(rewritten(tmp_path / "bf16", checkpoint, decoded))
    assert len(of_blocks) == 3 * VARIANTS["gpt_oss"]["num_hidden_layers"]
    for name, experts in of_blocks.items():
        for part, tensor in (*experts.named_parameters(), *experts.named_buffers()):
            other = dict((*of_values[name].named_parameters(), *of_values[name].named_buffers()))[part]
            assert tensor.detach().contiguous().view(torch.uint8).equal(other.detach().contiguous().view(torch.uint8))


def test_every_mxfp4_value_is_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scales = torch.tensor([0, 1, 100, 120, 126, 127, 128, 140, 200, 240, 90, 80, 60, 40, 20, 10], dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks.clone(), scales.view(1, 1, 16).clone(), dtype=torch.bfloat16)
    ours = decode_mxfp4(blocks[0], scales.view(1, 16))
    assert ours.equal(theirs[0].T)


def test_experts_stored_in_no_known_layout_are_named(tmp_path: Path) -> None:
    checkpoint = case("qwen3_moe").checkpoint
    weights = {n.replace(".experts.", ".other."): t for n, t in load_file(checkpoint / "model.safetensors").items()}
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight"):
        load_model(rewritten(tmp_path / "c", checkpoint, weights), device="cpu")


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint = case("qwen3_moe").checkpoint
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        load_model(rewritten(tmp_path / "c", checkpoint, weights), device="cpu")
