"""Packed checkpoints: ours and bitsandbytes', written and read, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qsharded.checkpoint import load_model
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.packed_format import own_config
from qsharded.models import CausalLM
from qsharded.nn import LoRAConfig, PackedLinear
from qsharded.quant import formats
from tests.checkpoints import write_checkpoint

CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12) * 5 % 97
# 192 / 64 = 3 blocks a row: absmax rows are padded here, and second-level blocks straddle rows
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 192,
    "intermediate_size": 320,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Qwen2, with biases, in two files."""
    return write_checkpoint(tmp_path_factory.mktemp("original"), shards=2, **QWEN)


def by_bitsandbytes(original: Path, target: Path, **options: Any) -> Path:
    """``original`` quantized and saved by transformers with bitsandbytes."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} | options
    quantization = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def theirs(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_bitsandbytes(original, tmp_path_factory.mktemp("theirs"), bnb_4bit_use_double_quant=True)


def quantized(original: Path, target: Path, form: str = "qsharded") -> Path:
    target.mkdir(exist_ok=True)
    quantize_checkpoint(original, target, form, CPU)
    return target


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}


def state_bytes(model: CausalLM) -> dict[str, Tensor]:
    return {name: t.contiguous().reshape(-1).view(torch.uint8) for name, t in model.state_dict().items()}


def assert_same_model(found: CausalLM, expected: CausalLM) -> None:
    got, wanted = state_bytes(found), state_bytes(expected)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


# --- ours ---


@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_quantized_checkpoint_loads_to_the_very_bytes(tmp_path: Path, stored: torch.dtype, form: str) -> None:
    original = write_checkpoint(tmp_path, shards=2, **QWEN)
    for path in original.glob("*.safetensors"):
        save_file({name: w.to(stored) for name, w in load_file(path).items()}, path)
    packed = quantized(original, tmp_path / "packed", form)
    lora = LoRAConfig(r=3)
    assert_same_model(load_model(packed, lora=lora, seed=5), load_model(original, lora=lora, seed=5))


def test_our_tensors_are_the_formats(original: Path, tmp_path: Path) -> None:
    sources, packed = tensors(original), tensors(quantized(original, tmp_path))
    for name, weight in sources.items():
        if weight.dim() == 1 or "embed" in name or "lm_head" in name:
            assert torch.equal(packed.pop(name), weight)
            continue
        expected = formats.quantize(weight)
        assert torch.equal(packed.pop(name), expected.codes)
        assert torch.equal(packed.pop(f"{name}_absmax"), expected.absmax_codes)
        assert torch.equal(packed.pop(f"{name}_absmax_scales"), expected.absmax_scales)
        assert torch.equal(packed.pop(f"{name}_absmax_offset"), expected.absmax_offset)
    assert not packed


def test_our_form_without_double_quantization(original: Path, tmp_path: Path) -> None:
    """As the transformers integration saves it: the bytes of the fp32 absmax, row by row."""
    described, weights = json.loads((original / "config.json").read_text()), tensors(original)
    for name, weight in list(weights.items()):
        if "_proj.weight" in name:
            expected = formats.quantize(weight, double_quant=False)
            weights |= {name: expected.codes, f"{name}_absmax": expected.absmax.view(torch.uint8)}
    save_file(weights, tmp_path / "model.safetensors")
    said = own_config() | {"double_quant": False}
    (tmp_path / "config.json").write_text(json.dumps(described | {"quantization_config": said}))
    model = load_model(tmp_path)
    for name, weight in tensors(original).items():
        if "_proj.weight" in name:
            dequantized = model.get_submodule(name.removesuffix(".weight")).dequantize(torch.float32)
            assert torch.equal(dequantized, formats.quantize(weight, double_quant=False).dequantize(torch.float32)), (
                name
            )


def test_the_index_and_the_config_are_whole(original: Path, tmp_path: Path) -> None:
    packed = quantized(original, tmp_path)
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in packed.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in tensors(packed).values())
    described = json.loads((packed / "config.json").read_text())
    said = described.pop("quantization_config")
    assert (said["quant_method"], said["version"]) == ("qsharded", 1)
    assert described == json.loads((original / "config.json").read_text())


def test_one_file_stays_one_and_a_tied_head_is_left_out(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path, tie_word_embeddings=True)
    packed = quantized(original, tmp_path / "packed")
    assert sorted(path.name for path in packed.iterdir()) == ["config.json", "model.safetensors"]
    assert "lm_head.weight" not in tensors(packed)
    assert_same_model(load_model(packed), load_model(original))


def test_a_layer_that_does_not_fit_stays_as_it_is(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path, intermediate_size=100)
    for form in ("qsharded", "bitsandbytes"):
        packed = quantized(original, tmp_path / form, form)
        assert_same_model(load_model(packed), load_model(original))
        down = tensors(packed)["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(down, tensors(original)["model.layers.0.mlp.down_proj.weight"])


def test_what_is_packed_is_not_packed_again(original: Path, tmp_path: Path) -> None:
    packed = quantized(original, tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed already; give --model the 16-bit checkpoint"):
        quantized(packed, tmp_path / "again")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_that_is_not_finite_is_not_written(tmp_path: Path, name: str) -> None:
    original = write_checkpoint(tmp_path)
    weights = tensors(original)
    weights[name].view(-1)[5] = torch.inf
    save_file(weights, original / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        quantized(original, tmp_path / "packed")


# --- bitsandbytes' ---


def dequantized_by_bitsandbytes(folder: Path) -> dict[str, Tensor]:
    """Every packed weight as bitsandbytes dequantizes it, to fp32 from its own state."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            weights[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
    assert len(weights) == 14
    return weights


def test_transformers_loads_what_we_write_to_our_weights(original: Path, tmp_path: Path) -> None:
    dequantized = dequantized_by_bitsandbytes(quantized(original, tmp_path, "bitsandbytes"))
    model = load_model(original)
    for name, weight in dequantized.items():
        assert torch.equal(weight, model.get_submodule(name).dequantize(torch.float32)), name


def test_our_files_are_theirs_key_by_key(original: Path, theirs: Path, tmp_path: Path) -> None:
    """Names, types, shapes, codes, maps and JSON text; the second level may differ, its mean is summed otherwise."""
    ours, expected = tensors(quantized(original, tmp_path, "bitsandbytes")), tensors(theirs)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("bitsandbytes__nf4"):
            text, wanted = (bytes(t.numpy()).decode() for t in (ours[name], tensor))
            head, separator, offset = text.partition('"nested_offset": ')
            wanted_head, _, wanted_offset = wanted.partition('"nested_offset": ')
            assert (head, bool(separator), offset[-1]) == (wanted_head, True, wanted_offset[-1])
            assert json.dumps(json.loads(text)) == text
            assert float(offset[:-1]) == pytest.approx(float(wanted_offset[:-1]), rel=1e-6)
            continue
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if not name.endswith(("weight.absmax", "nested_absmax")):
            assert torch.equal(ours[name], tensor), name


def test_our_config_says_what_theirs_says(original: Path, theirs: Path, tmp_path: Path) -> None:
    ours = json.loads((quantized(original, tmp_path, "bitsandbytes") / "config.json").read_text())
    expected = json.loads((theirs / "config.json").read_text())
    assert json.dumps(ours["quantization_config"]) == json.dumps(expected["quantization_config"])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_their_checkpoints_keep_their_bytes(
    original: Path, tmp_path: Path, double_quant: bool, storage: torch.dtype
) -> None:
    options = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_storage": storage}
    folder = by_bitsandbytes(original, tmp_path, **options)
    model, stored = load_model(folder, dtype=torch.float32), tensors(folder)
    for name, weight in dequantized_by_bitsandbytes(folder).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        codes, absmax, scales, _ = layer.packed().tensors
        assert torch.equal(codes.reshape(-1), stored[f"{name}.weight"].reshape(-1).view(torch.uint8))
        assert torch.equal(absmax.reshape(-1), stored[f"{name}.weight.absmax"])
        assert (scales is not None) == double_quant
        assert torch.equal(layer.dequantize(torch.float32), weight), name


def with_plain_weights(model: CausalLM) -> CausalLM:
    """The same model with its packed layers dequantized, a plain one each."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data, plain.bias = layer.dequantize(torch.float32), layer.bias
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("double_quant", [True, False])
def test_their_model_computes_with_the_dequantized_weights(original: Path, tmp_path: Path, double_quant: bool) -> None:
    folder = by_bitsandbytes(original, tmp_path, bnb_4bit_use_double_quant=double_quant)
    logits = load_model(folder, dtype=torch.float32)(IDS)
    assert torch.equal(logits, with_plain_weights(load_model(folder, dtype=torch.float32))(IDS))


def test_layers_that_they_left_out_stay_plain(original: Path, tmp_path: Path) -> None:
    skipped = ["lm_head", "model.layers.1.mlp"]
    folder = by_bitsandbytes(original, tmp_path, llm_int8_skip_modules=skipped, bnb_4bit_use_double_quant=True)
    model = load_model(folder)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 14 - 3
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(up), tensors(original)[up])


def test_a_module_that_they_packed_cannot_be_trained_in_full(theirs: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mlp.down_proj is packed in this checkpoint, so .* give the 16-bit checkpoint"
    ):
        load_model(theirs, lora=LoRAConfig(modules_to_save=["down_proj"]))


# --- refused ---

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def changed(theirs: Path, target: Path, change: Change) -> Path:
    """A copy of ``theirs`` after ``change(quantization_config, tensors)``."""
    described, weights = json.loads((theirs / "config.json").read_text()), tensors(theirs)
    change(described["quantization_config"], weights)
    (target / "config.json").write_text(json.dumps(described))
    save_file(weights, target / "model.safetensors")
    return target


UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def state(**values: Any) -> Change:
    def change(_: dict[str, Any], weights: dict[str, Tensor]) -> None:
        found = json.loads(bytes(weights[STATE].numpy())) | values
        weights[STATE] = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def said(**values: Any) -> Change:
    return lambda config, _: config.update(values)


def tensor(name: str, edit: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, weights: weights.update({name: edit(weights[name])})


def without_any(_: dict[str, Any], weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if ".weight." in name]:
        del weights[name]


REFUSED: dict[str, tuple[Change, str]] = {
    "other levels": (said(bnb_4bit_quant_type="fp4"), r"packed weights \(bitsandbytes, fp4\), but there is none"),
    "af4": (said(bnb_4bit_quant_type="af4"), "bnb_4bit_quant_type is 'af4'; only nf4 and fp4 are read; give"),
    "int8": (said(load_in_8bit=True, load_in_4bit=False), "this is an LLM.int8 checkpoint; .*; give the 16-bit"),
    "gptq": (said(quant_method="gptq"), "quant_method 'gptq' is not read here; give the 16-bit"),
    "our next version": (said(quant_method="qsharded", version=2), "version must be 1 .*, got 2; quantize the 16-bit"),
    "our blocks of 96": (said(**own_config() | {"block_size": 96}), r"block_size must be one of \(32, .*, got 96; "),
    "blocks of 128": (state(blocksize=128), rf"{UP} has blocksize 128, only 64 is read here; give the 16-bit"),
    "nested blocks": (state(nested_blocksize=512), rf"{UP} has nested_blocksize 512, only 256"),
    "another shape": (state(shape=[192, 320]), rf"{UP} has shape \[192, 320\], only \[320, 192\]"),
    "no offset": (state(nested_offset=None), rf"{UP} has nested_offset None, not a number"),
    "no JSON": (tensor(STATE, lambda t: t[:-1]), r"quant_state\.bitsandbytes__nf4 is not valid JSON"),
    "another map": (tensor(f"{UP}.quant_map", lambda t: t + 1e-3), rf"{UP}\.quant_map is another map"),
    "another nested map": (tensor(f"{UP}.nested_quant_map", lambda t: t * 2), "nested_quant_map is another map"),
    "short codes": (tensor(UP, lambda t: t[:-2]), rf"{UP} has 30718 bytes, config\.json's shapes ask for 30720"),
    "short absmax": (tensor(f"{UP}.absmax", lambda t: t[:-2]), rf"{UP}\.absmax has 958 bytes"),
    "fp32 absmax": (tensor(f"{UP}.absmax", lambda t: t.float()), r"\.absmax is torch\.float32, must be torch\.uint8"),
    "infinite scales": (tensor(f"{UP}.nested_absmax", lambda t: t / 0), r"nested_absmax holds NaN or infinity"),
    "not nested after all": (said(bnb_4bit_use_double_quant=False), "no place for: .*nested_absmax"),
    "nothing packed": (without_any, r"speaks of packed weights \(bitsandbytes, nf4\), but there is none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(theirs: Path, tmp_path: Path, case: str) -> None:
    change, complaint = REFUSED[case]
    with pytest.raises(ValueError, match=complaint):
        load_model(changed(theirs, tmp_path, change))


def test_a_packed_head_is_refused(original: Path, tmp_path: Path) -> None:
    folder = by_bitsandbytes(original, tmp_path, llm_int8_skip_modules=["nothing"], bnb_4bit_use_double_quant=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is packed; only linear layers other than the head"):
        load_model(folder)


def test_random_weights_do_not_care_how_a_checkpoint_is_packed(theirs: Path, original: Path) -> None:
    assert_same_model(load_model(theirs, random_init=True, seed=1), load_model(original, random_init=True, seed=1))
