"""FP4, and blocks of 32 to 4096: checkpoints of bitsandbytes and ours, read and written."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded.checkpoint import load_model
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.report import inspect_path
from qsharded.models import CausalLM
from qsharded.nn import PackedLinear
from qsharded.quant import formats
from tests.checkpoint.test_packed_format import with_plain_weights
from tests.checkpoints import pack_by_bitsandbytes, packed_by_bitsandbytes, write_checkpoint

IDS = torch.arange(24).view(2, 12) * 5 % 97
KINDS = [("fp4", 64), ("nf4", 32), ("fp4", 128), ("nf4", 4096), ("fp4", 4096)]
every_kind = pytest.mark.parametrize(("quant_type", "block_size"), KINDS)
PACKED = {32: 14, 64: 14, 128: 14, 4096: 10}  # layers that fit


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether blocks are of 4096. Else rows have 1, 2, 3, 4, 6 and 12 blocks; of those one, and o_proj and down_proj
    are no multiple of it."""
    wide = {"hidden_size": 4096, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 4}
    small = {"hidden_size": 384, "intermediate_size": 128}
    folders = {True: tmp_path_factory.mktemp("wide"), False: tmp_path_factory.mktemp("small")}
    return {is_wide: write_checkpoint(folder, **(wide if is_wide else small)) for is_wide, folder in folders.items()}


def layers(model: CausalLM) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@every_kind
@pytest.mark.parametrize("nested", [True, False])
def test_what_bitsandbytes_packed_keeps_its_bytes_and_computes_with_them(
    originals: dict[bool, Path], tmp_path: Path, quant_type: str, block_size: int, nested: bool
) -> None:
    folder = pack_by_bitsandbytes(originals[block_size == 4096], tmp_path, quant_type, block_size, nested)
    model, stored = load_model(folder, dtype=torch.float32), load_file(folder / "model.safetensors")
    assert len(layers(model)) == PACKED[block_size]
    for name, layer in layers(model).items():
        assert (layer.quant_type, layer.block_size) == (quant_type, block_size)
        codes, absmax, scales, _ = layer.packed().tensors
        assert torch.equal(codes.reshape(-1), stored[f"{name}.weight"].reshape(-1))
        assert torch.equal(absmax.reshape(-1), stored[f"{name}.weight.absmax"])
        assert (scales is not None) == nested
        assert torch.equal(layer.dequantize(torch.float32), as_bitsandbytes_dequantizes(stored, f"{name}.weight")), name
    logits = model(IDS)
    assert torch.equal(logits, with_plain_weights(model)(IDS))


def as_bitsandbytes_dequantizes(stored: dict[str, Tensor], name: str) -> Tensor:
    """In fp32."""
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    state = bitsandbytes.functional.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(stored[name], state)


@every_kind
@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
def test_what_is_written_is_read_to_the_formats_bytes(
    originals: dict[bool, Path], tmp_path: Path, quant_type: str, block_size: int, form: str
) -> None:
    original = originals[block_size == 4096]
    quantize_checkpoint(original, tmp_path, form, torch.device("cpu"), formats.QuantFormat(quant_type, block_size))
    model, weights = load_model(tmp_path), load_file(original / "model.safetensors")
    assert len(layers(model)) == PACKED[block_size]
    for name, layer in layers(model).items():
        expected = formats.quantize(weights[f"{name}.weight"], quant_type=quant_type, block_size=block_size)
        parts = expected.codes, expected.absmax_codes, expected.absmax_scales, expected.absmax_offset
        for found, wanted in zip(layer.packed().tensors, parts, strict=True):
            assert torch.equal(found, wanted), name
    report = inspect_path(tmp_path)
    assert not report.problems
    fitting = [w.numel() for name, w in weights.items() if name.removesuffix(".weight") in layers(model)]
    assert report.classes["codes"] == sum(fitting) // 2


@every_kind
def test_what_is_written_for_bitsandbytes_is_its_own(
    originals: dict[bool, Path], tmp_path: Path, quant_type: str, block_size: int
) -> None:
    """By names, types, sizes, codes, maps and JSON, and by what transformers loads. The second level may differ: its
    mean is summed in another order."""
    original = originals[block_size == 4096]
    quantize_checkpoint(
        original, tmp_path, "bitsandbytes", torch.device("cpu"), formats.QuantFormat(quant_type, block_size)
    )
    theirs = load_file(
        pack_by_bitsandbytes(original, tmp_path / "theirs", quant_type, block_size, True) / "model.safetensors"
    )
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:
            described, wanted = (json.loads(bytes(state.numpy())) for state in (ours[name], tensor))
            assert described.pop("nested_offset") == pytest.approx(wanted.pop("nested_offset"), rel=1e-6)
            assert list(described.items()) == list(wanted.items())
            continue
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if not name.endswith(("weight.absmax", "nested_absmax")):
            assert torch.equal(ours[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, layer in layers(load_model(tmp_path)).items():
        weight = loaded.get_submodule(name).weight
        dequantized = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(dequantized, layer.dequantize(dequantized.dtype)), name


def test_rows_of_no_whole_blocks_are_refused_by_name(originals: dict[bool, Path], tmp_path: Path) -> None:
    """bitsandbytes packs them all the same, flat."""
    folder = pack_by_bitsandbytes(originals[False], tmp_path, "fp4", 256, True, torn_rows=True)
    message = r"layers.0.self_attn.q_proj: in_features = 384 is no multiple of its blocks of 256; .* 16-bit checkpoint"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_second_kind_in_a_checkpoint_is_refused_by_name(originals: dict[bool, Path], tmp_path: Path) -> None:
    folder = pack_by_bitsandbytes(originals[False], tmp_path, "nf4", 128, True)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(originals[False] / "model.safetensors")[name]
    other = packed_by_bitsandbytes(name, weight, "nf4", 32, True)
    save_file(load_file(folder / "model.safetensors") | other, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has blocksize 32, only 128 is read here"):
        load_model(folder)


@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
def test_inspecting_counts_the_scales_of_the_kind(originals: dict[bool, Path], tmp_path: Path, form: str) -> None:
    quantize_checkpoint(originals[False], tmp_path, form, torch.device("cpu"), formats.QuantFormat("fp4", 128))
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight" + ("_absmax" if form == "qsharded" else ".absmax")
    assert weights[name].numel() == 128 * 3
    weights[name] = weights[name].flatten().repeat(2)  # as many as blocks of 64 have
    save_file(weights, tmp_path / "model.safetensors")
    [problem] = inspect_path(tmp_path).problems
    assert problem.startswith(f"{name} is [768], config.json asks for")


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_model_that_only_blocks_of_32_fit_is_inspected(tmp_path: Path, is_packed: bool) -> None:
    original = tmp_path / "original"
    original.mkdir()
    write_checkpoint(original, hidden_size=96, num_attention_heads=3, num_key_value_heads=3, intermediate_size=160)
    if is_packed:
        (tmp_path / "packed").mkdir()
        kind = formats.QuantFormat("fp4", 32)
        quantize_checkpoint(original, tmp_path / "packed", "qsharded", torch.device("cpu"), kind)
    assert not inspect_path(tmp_path / ("packed" if is_packed else "original")).problems
