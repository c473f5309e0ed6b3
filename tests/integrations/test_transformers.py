"""transformers reads, writes and shards models of PackedLinear layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.quantizers import HfQuantizer

from qsharded.checkpoint import load_model
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.integrations.transformers import QShardedConfig, from_bitsandbytes
from qsharded.nn import PackedLinear
from qsharded.quant import formats
from tests.checkpoints import pack_by_bitsandbytes, write_checkpoint
from tests.distributed.harness import run_ranks
from tests.models.architectures import write_architecture

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 3 and 5 blocks, whose absmax is padded; 97 rows of the head and 96 of k_proj divide by 2 or do not."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=192, intermediate_size=320)


def read(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantized(folder: Path, config: Any = None, **settings: Any) -> PreTrainedModel:
    return read(folder, config=config, quantization_config=QShardedConfig(**settings))


def as_bytes(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def test_its_bytes_are_those_of_the_native_loader(checkpoint: Path) -> None:
    model = quantized(checkpoint)
    assert as_bytes(model.state_dict()) == as_bytes(load_model(checkpoint, device="cpu").state_dict())
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, PackedLinear) for p in m.parameters())


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_saved_model_is_read_bit_for_bit(checkpoint: Path, tmp_path: Path, double_quant: bool) -> None:
    model = quantized(checkpoint, double_quant=double_quant)
    model.save_pretrained(tmp_path)
    again = read(tmp_path)
    assert isinstance(again.model.layers[0].mlp.up_proj, PackedLinear)
    assert as_bytes(again.state_dict()) == as_bytes(model.state_dict())
    tokens = [m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (model, again)]
    assert torch.equal(*tokens)


def test_it_saves_what_the_quantize_command_writes(checkpoint: Path, tmp_path: Path) -> None:
    """uint8 codes and absmax without padding, under the names and with the words that the native loader reads."""
    model = quantized(checkpoint)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            endings = ("", "_absmax", "_absmax_scales", "_absmax_offset")
            for ending, tensor in zip(endings, layer.packed().tensors, strict=True):
                found = stored.pop(f"{name}.weight{ending}")
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found, tensor)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    own = {"quant_method": "qsharded", "version": 1, "format": "nf4", "block_size": 64, "absmax_block_size": 256}
    assert own.items() <= said.items()


@pytest.mark.parametrize(("key", "value"), [("block_size", 96), ("format", "int4"), ("version", 2)])
def test_another_format_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"QShardedConfig: .*{key}.* must be .*, got {value!r}"):
        QShardedConfig(**{key: value})


def test_without_double_quantization_the_absmax_is_kept_in_fp32(checkpoint: Path) -> None:
    layer = quantized(checkpoint, double_quant=False).model.layers[1].mlp.down_proj
    stored = load_file(checkpoint / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(
        layer.dequantize(torch.float32), formats.quantize(stored, double_quant=False).dequantize(torch.float32)
    )


def test_the_layers_to_leave_out_can_be_named(checkpoint: Path) -> None:
    model = quantized(checkpoint, modules_to_not_convert=["lm_head", "o_proj"])
    kept = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", "o_proj"}


def test_a_bf16_checkpoint_can_be_computed_with_in_fp32(checkpoint: Path) -> None:
    model = read(checkpoint, dtype=torch.float32, quantization_config=QShardedConfig())
    assert as_bytes(model.state_dict()) == as_bytes(
        load_model(checkpoint, dtype=torch.float32, device="cpu").state_dict()
    )


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(RuntimeError):  # transformers' own, after a report of each weight at fault
        quantized(tmp_path)


@pytest.fixture
def bitsandbytes_folder(checkpoint: Path, tmp_path: Path) -> Any:
    def write(**options: Any) -> tuple[PreTrainedModel, Path]:
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        model = read(checkpoint, quantization_config=BitsAndBytesConfig(**config | options))
        model.save_pretrained(tmp_path)
        return model, tmp_path

    return write


KEEPS_DTYPES = hasattr(HfQuantizer, "get_new_dtype")  # from transformers 5.21 on


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, *([torch.float16] if KEEPS_DTYPES else [])])
@pytest.mark.parametrize("nested", [True, False])
def test_a_bitsandbytes_checkpoint_keeps_its_bytes(
    bitsandbytes_folder: Any, nested: bool, storage: torch.dtype
) -> None:
    theirs, folder = bitsandbytes_folder(bnb_4bit_use_double_quant=nested, bnb_4bit_quant_storage=storage)
    ours = read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)))
    layers = [(m, ours.get_submodule(name)) for name, m in theirs.named_modules() if hasattr(m, "quant_state")]
    assert len(layers) == 14
    for their, our in layers:
        state = their.weight.quant_state
        codes, absmax, scales, offset = our.packed().tensors
        assert torch.equal(codes.flatten(), their.weight.detach().view(torch.uint8).flatten())
        assert torch.equal(absmax.flatten(), state.absmax)
        assert (scales is not None) == nested
        if nested:
            assert torch.equal(scales, state.state2.absmax)
            assert torch.equal(offset, state.offset)
    ours.save_pretrained(folder / "ours")
    assert as_bytes(read(folder / "ours").state_dict()) == as_bytes(ours.state_dict())


@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_codes_that_an_older_transformers_would_change_are_refused(
    bitsandbytes_folder: Any, monkeypatch: pytest.MonkeyPatch, storage: torch.dtype
) -> None:
    _, folder = bitsandbytes_folder(bnb_4bit_quant_storage=storage)
    if KEEPS_DTYPES:  # stand in for one that doesn't
        monkeypatch.delattr(HfQuantizer, "get_new_dtype")
    with pytest.raises(ValueError, match=r"codes are stored as F(16|32), .* install transformers 5\.21"):
        read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)))


def test_a_bitsandbytes_checkpoint_in_fp4_keeps_its_bytes(bitsandbytes_folder: Any) -> None:
    theirs, folder = bitsandbytes_folder(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    ours = read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)))
    layers = [(m, ours.get_submodule(name)) for name, m in theirs.named_modules() if hasattr(m, "quant_state")]
    for their, our in layers:
        expected = dequantize_4bit(their.weight.data, their.weight.quant_state)
        assert torch.equal(our.dequantize(expected.dtype), expected)


KINDS = [("fp4", 64, True), ("nf4", 32, False), ("fp4", 32, True)]


@pytest.mark.parametrize(("quant_type", "block_size", "nested"), KINDS)
def test_every_kind_is_read_and_saved_as_the_native_loader_has_it(
    checkpoint: Path, tmp_path: Path, quant_type: str, block_size: int, nested: bool
) -> None:
    """From bitsandbytes' files, and then from ours."""
    folder = pack_by_bitsandbytes(checkpoint, tmp_path / "theirs", quant_type, block_size, nested)
    expected = as_bytes(load_model(folder, device="cpu").state_dict())
    model = read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)), dtype=torch.bfloat16)
    assert as_bytes(model.state_dict()) == expected
    model.save_pretrained(tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (said["format"], said["block_size"], said["double_quant"]) == (quant_type, block_size, nested)
    for again in (read(tmp_path / "ours"), load_model(tmp_path / "ours", device="cpu")):
        assert as_bytes(again.state_dict()) == expected


@pytest.mark.parametrize(("quant_type", "block_size"), [("fp4", 64), ("nf4", 32)])
def test_every_kind_is_quantized_as_the_quantize_command_does(
    checkpoint: Path, tmp_path: Path, quant_type: str, block_size: int
) -> None:
    model = quantized(checkpoint, format=quant_type, block_size=block_size)
    quantize_checkpoint(
        checkpoint, tmp_path, "qsharded", torch.device("cpu"), formats.QuantFormat(quant_type, block_size)
    )
    assert as_bytes(model.state_dict()) == as_bytes(load_model(tmp_path, device="cpu").state_dict())
    assert torch.isfinite(model(IDS).logits).all()


def test_rows_of_bitsandbytes_that_are_no_whole_blocks_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = pack_by_bitsandbytes(checkpoint, tmp_path, "nf4", 256, True, torn_rows=True)
    with pytest.raises(ValueError, match=r"q_proj: in_features = 192 is no multiple of its blocks of 256"):
        read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)))


def test_a_bitsandbytes_checkpoint_can_be_computed_with_in_fp32(bitsandbytes_folder: Any) -> None:
    _, folder = bitsandbytes_folder(bnb_4bit_use_double_quant=True)
    ours = read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)), dtype=torch.float32)
    assert ours(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("kept", ["load_in_4bit", "_load_in_4bit"])
def test_a_bitsandbytes_checkpoint_need_not_name_its_method(bitsandbytes_folder: Any, kept: str) -> None:
    """As transformers wrote them in 2023."""
    _, folder = bitsandbytes_folder()
    expected = as_bytes(read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder))).state_dict())
    path = folder / "config.json"
    described = json.loads(path.read_text())
    for key in {"quant_method", "load_in_4bit", "_load_in_4bit"} - {kept}:
        del described["quantization_config"][key]
    path.write_text(json.dumps(described))
    ours = read(folder, config=from_bitsandbytes(AutoConfig.from_pretrained(folder)))
    assert as_bytes(ours.state_dict()) == expected


def test_what_bitsandbytes_stores_otherwise_is_refused(bitsandbytes_folder: Any, checkpoint: Path) -> None:
    _, folder = bitsandbytes_folder()
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["bnb_4bit_quant_type"] = "af4"
    with pytest.raises(ValueError, match="bnb_4bit_quant_type is 'af4'; only nf4 and fp4 are read"):
        from_bitsandbytes(config)
    with pytest.raises(ValueError, match="not quantized to 4 bits by bitsandbytes"):
        from_bitsandbytes(AutoConfig.from_pretrained(checkpoint))


Sharded = tuple[Tensor, Tensor, int]


def sharded(folders: list[tuple[Path, Path]]) -> list[list[Sharded]]:
    """Of models that are quantized into shards, and of what they save: logits, generated tokens and the rows of a
    packed weight that are here."""
    return [
        [results(folder, saved, quantization_config=QShardedConfig()), results(saved, None)]
        for folder, saved in folders
    ]


def results(folder: Path, save_to: Path | None, **options: Any) -> Sharded:
    model = read(folder, distributed_config=DistributedConfig(fsdp_size=3), **options)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    if save_to is not None:
        model.save_pretrained(save_to)
    mlp = model.model.layers[0].mlp
    linear = mlp.experts.down_proj if hasattr(mlp, "experts") else model.model.layers[0].self_attn.k_proj
    return model(IDS).logits.detach(), tokens, len(linear.weight.to_local())


def test_sharded_by_transformers_it_equals_one_process(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A decoder; and mixtures, whose layers have four experts of 64 rows: shards begin inside one."""
    mixtures = ("olmoe", "gpt_oss") if pytestconfig.getoption("--slow") else ("olmoe",)
    rows_of = {"dense": [15] * 4 + [14] * 2, **dict.fromkeys(mixtures, [86] * 4 + [84] * 2)}
    folders = {name: (tmp_path / name, tmp_path / f"{name}-saved") for name in rows_of}
    folders["dense"][0].mkdir()
    write_checkpoint(folders["dense"][0], hidden_size=192, num_attention_heads=3, num_key_value_heads=1, head_dim=44)
    for name in mixtures:
        write_architecture(folders[name][0], name)
    one = {name: quantized(folder) for name, (folder, _) in folders.items()}
    ranks = run_ranks(sharded, 3, list(folders.values()))
    for index, (name, model) in enumerate(one.items()):
        expected, held = (model(IDS).logits, model.generate(IDS, max_new_tokens=4, do_sample=False)), []
        for logits, tokens, rows in (of_one for of_rank in ranks for of_one in of_rank[index]):
            assert torch.equal(logits, expected[0])
            assert torch.equal(tokens, expected[1])
            held.append(rows)
        assert held == rows_of[name]
        assert as_bytes(read(folders[name][1]).state_dict()) == as_bytes(model.state_dict())


def quantized_into_shards(folder: Path, damaged: Path) -> tuple[int, Tensor, str]:
    """Rows of k_proj that are here, the logits, and the refusal of a checkpoint with NaN in the last rank's rows."""
    options = {"distributed_config": DistributedConfig(fsdp_size=3), "quantization_config": QShardedConfig()}
    model = read(folder, **options)
    with pytest.raises(RuntimeError) as error:  # transformers' own, after a report of each weight at fault
        read(damaged, **options)
    k_proj = model.model.layers[0].self_attn.k_proj.weight
    return len(k_proj.to_local()), model(IDS).logits.detach(), str(error.value)


def test_a_rank_without_rows_takes_part_and_all_refuse_what_one_finds(tmp_path: Path) -> None:
    """k_proj and v_proj have two rows, for three ranks."""
    folder, damaged = tmp_path / "sound", tmp_path / "damaged"
    for path in (folder, damaged):
        path.mkdir()
        write_checkpoint(path, hidden_size=64, head_dim=2, num_attention_heads=4, num_key_value_heads=1)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    expected = quantized(folder)(IDS).logits
    ranks = run_ranks(quantized_into_shards, 3, folder, damaged)
    assert [rows for rows, _, _ in ranks] == [1, 1, 0]
    assert all(torch.equal(logits, expected) for _, logits, _ in ranks)
    assert {said for _, _, said in ranks} == {ranks[0][2]}
    assert "conversion" in ranks[0][2]


def test_tensor_parallelism_is_refused(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match=r"^tp_size = 2: a QSharded model can be sharded by FSDP2 alone"):
        quantized(checkpoint, config=config)


def test_a_bitsandbytes_checkpoint_is_not_read_into_shards(bitsandbytes_folder: Any) -> None:
    _, folder = bitsandbytes_folder(bnb_4bit_use_double_quant=True)
    config = from_bitsandbytes(AutoConfig.from_pretrained(folder))
    config.distributed_config = DistributedConfig(fsdp_size=2)
    with pytest.raises(ValueError, match="load it in one process, save_pretrained it"):
        read(folder, config=config)
