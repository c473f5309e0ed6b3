"""Reading a checkpoint into shards: the same bytes for any number of ranks, and never a full-size weight."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qsharded.checkpoint import load_model, read_ahead
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.distributed.choose_layout import SHARDED, Layout
from qsharded.nn import LoRAConfig, PackedLinear
from qsharded.quant import formats
from qsharded.utils.sharding import local, own_rows, whole
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows divide unevenly: K = 192 has 3 blocks a row, and 80 rows are cut by 3 ranks."""
    return write_checkpoint(tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320, shards=3)


def packed_as(form: str, folder: Path, target: Path) -> Path:
    """The same, packed already."""
    if form.endswith("not nested"):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization).save_pretrained(target)
    else:
        quantize_checkpoint(folder, target, form, torch.device("cpu"))
    return target


def gathered_bytes(
    path: Path, world_size: int, layout: Layout = SHARDED, random_init: bool = False
) -> dict[str, Tensor]:
    """Every parameter and buffer of the sharded model, whole, as uint8; gathered here by plain integer means.

    Where there are several ranks, they read in pieces of a few rows.
    """
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    if mesh is not None:
        read_ahead.PIECE = 3000
    model = load_model(
        path,
        mesh=mesh,
        lora=LoRAConfig(r=3),
        dtype=torch.bfloat16,
        layout=layout,
        activation_checkpointing="full",
        seed=7,
        random_init=random_init,
    )
    state = {name: whole_bytes(tensor) for name, tensor in model.named_parameters()}
    return state | {name: buffer.reshape(-1).view(torch.uint8) for name, buffer in model.named_buffers()}


def whole_bytes(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().contiguous().view(torch.uint8)
    rows, own = own_rows(tensor), tensor.to_local().detach().contiguous()
    assert own.shape[0] == rows.count
    full = torch.zeros(tensor.shape, dtype=tensor.dtype)
    full[rows.start : rows.stop].view(torch.uint8).copy_(own.view(torch.uint8))
    full = full.view(torch.uint8)
    torch.distributed.all_reduce(full)
    return full


@pytest.fixture(scope="module")
def bytes_alone(folder: Path) -> dict[str, Tensor]:
    """What one process without any layout has."""
    return run_ranks(gathered_bytes, 1, folder, 1, Layout())[0]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, Layout()),
        (3, Layout()),
        (4, Layout(vocab_parallel=True)),
        (1, Layout(on_host=True)),
        (3, Layout(on_host=True)),
        (2, Layout(replicated=True)),
    ],
)
def test_bytes_are_the_same_for_any_number_of_ranks(
    folder: Path, bytes_alone: dict[str, Tensor], world_size: int, layout: Layout
) -> None:
    assert any("weight_absmax_scales" in name for name in bytes_alone)
    for state in run_ranks(gathered_bytes, world_size, folder, world_size, layout):
        assert state.keys() == bytes_alone.keys()
        for name, expected in bytes_alone.items():
            assert torch.equal(state[name], expected), name


def test_random_weights_are_the_same_on_three_ranks(tmp_path: Path) -> None:
    """Of 2,100 rows a rank has 700, and runs of 1,024 are drawn."""
    folder = write_checkpoint(tmp_path, intermediate_size=2112, vocab_size=2100)
    alone = run_ranks(gathered_bytes, 1, folder, 1, SHARDED, True)[0]
    for state in run_ranks(gathered_bytes, 3, folder, 3, SHARDED, True):
        for name, expected in alone.items():
            assert torch.equal(state[name], expected), name


@pytest.mark.parametrize("form", ["16 bits", "bitsandbytes"])
def test_a_rank_without_rows_takes_part(tmp_path: Path, form: str) -> None:
    """k_proj and v_proj have two rows, for three ranks."""
    folder = write_checkpoint(tmp_path, hidden_size=64, head_dim=2, num_key_value_heads=1)
    if form != "16 bits":
        (tmp_path / "packed").mkdir()
        folder = packed_as(form, folder, tmp_path / "packed")
    alone = run_ranks(gathered_bytes, 1, folder, 1)[0]
    for state in run_ranks(gathered_bytes, 3, folder, 3):
        for name, expected in alone.items():
            assert torch.equal(state[name], expected), name


@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes", "bitsandbytes, not nested"])
def test_a_packed_checkpoint_has_the_same_bytes_on_three_ranks(folder: Path, tmp_path: Path, form: str) -> None:
    packed = packed_as(form, folder, tmp_path)
    alone = run_ranks(gathered_bytes, 1, packed, 1)[0]
    for state in run_ranks(gathered_bytes, 3, packed, 3):
        assert state.keys() == alone.keys()
        for name, expected in alone.items():
            assert torch.equal(state[name], expected), name


def test_loaded_bytes_are_those_of_the_format(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    source = SafetensorsFolder(folder)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 2 * 7
    for name, layer in packed.items():
        weight = source.rows(f"{name}.weight", 0, layer.out_features)
        expected = formats.quantize(weight)
        codes, absmax_codes, scales, offset = layer.packed().tensors
        assert torch.equal(codes, expected.codes)
        assert torch.equal(absmax_codes, expected.absmax_codes)
        assert torch.equal(scales, expected.absmax_scales)
        assert torch.equal(offset, expected.absmax_offset)


def loss_and_gradient(path: Path, world_size: int, checkpointing: bool) -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    model = load_model(
        path,
        mesh=mesh,
        lora=LoRAConfig(r=3),
        dtype=torch.float32,
        activation_checkpointing="full" if checkpointing else "none",
        seed=7,
    )
    ids = torch.arange(24).view(2, 12) % 97
    loss = model(ids, targets_BS=ids)
    loss.backward()
    gradient = whole(model.get_parameter("model.layers.0.self_attn.q_proj.lora_B.weight").grad)
    return loss.detach(), gradient


def test_fp32_absmax_trains_alike_on_two_ranks(folder: Path, tmp_path: Path) -> None:
    packed = packed_as("bitsandbytes, not nested", folder, tmp_path)
    loss, gradient = run_ranks(loss_and_gradient, 1, packed, 1, False)[0]
    assert gradient.abs().max() > 0
    for other_loss, other_gradient in run_ranks(loss_and_gradient, 2, packed, 2, True):
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize(("world_size", "checkpointing"), [(1, True), (2, False), (3, True)])
def test_sharding_and_recomputation_change_no_result(folder: Path, world_size: int, checkpointing: bool) -> None:
    loss, gradient = run_ranks(loss_and_gradient, 1, folder, 1, False)[0]
    assert gradient.abs().max() > 0
    for other_loss, other_gradient in run_ranks(loss_and_gradient, world_size, folder, world_size, checkpointing):
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def head_adapter_gradients(path: Path, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of an adapted head, whose lora_B is not at its start, where lora_A would get none.

    Its rows differ: softmax does not see what they have in common, so rows that are alike give lora_A none either.
    """
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    lora = LoRAConfig(r=3, target_modules=r".*_proj|lm_head")
    model = load_model(path, mesh=mesh, lora=lora, dtype=torch.float32, seed=7)
    lora_B = model.get_parameter("lm_head.lora_B.weight")
    values, rows = torch.randn(lora_B.shape, generator=torch.Generator().manual_seed(5)), own_rows(lora_B)
    with torch.no_grad():
        local(lora_B).copy_(0.02 * values[rows.start : rows.stop])
    ids = torch.arange(24).view(2, 12) % 97
    loss = model(ids, targets_BS=ids)
    loss.backward()
    names = [f"lm_head.lora_{part}.weight" for part in "AB"]
    return loss.detach(), {name: whole(model.get_parameter(name).grad) for name in names}


def test_an_adapted_head_trains_alike_on_any_number_of_ranks(folder: Path) -> None:
    loss, gradients = run_ranks(head_adapter_gradients, 1, folder, 1)[0]
    for other_loss, others in run_ranks(head_adapter_gradients, 2, folder, 2):
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def refusal(path: Path, world_size: int) -> str:
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        load_model(path, mesh=init_device_mesh("cpu", (world_size,)), dtype=torch.bfloat16)
    return str(error.value)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_one_ranks_rows_is_named_by_all(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors[name][-1, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert all(name in message for message in run_ranks(refusal, 2, folder, 2))


def bytes_read(path: Path, world_size: int) -> dict[str, int]:
    """How many bytes of each tensor this rank reads."""
    asked: dict[str, int] = {}
    read = SafetensorsFolder.read_into

    def counting(self: SafetensorsFolder, name: str, first: int, raw: Tensor) -> None:
        asked[name] = asked.get(name, 0) + raw.numel()
        read(self, name, first, raw)

    SafetensorsFolder.read_into = counting
    load_model(path, mesh=init_device_mesh("cpu", (world_size,)), dtype=torch.bfloat16)
    return asked


def test_each_rank_reads_only_its_own_rows(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    asked = run_ranks(bytes_read, 3, folder, 3)
    for name in source.names():
        total, *others = source.shape(name)
        row_bytes = math.prod(others) * 2
        assert sum(rank[name] for rank in asked) == total * row_bytes
        assert max(rank[name] for rank in asked) == -(-total // 3) * row_bytes


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=1)
    source = SafetensorsFolder(folder)
    weights = {name: source.rows(name, 0, source.shape(name)[0]).clone() for name in source.names()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_model(folder)


class _Largest(TorchDispatchMode):
    """The most bytes of one tensor that an operation made in memory."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor for tensor in tensors if not (tensor.is_meta or isinstance(tensor, DTensor))]  # it has no memory
        self.nbytes = max([self.nbytes, *(tensor.untyped_storage().nbytes() for tensor in made)])
        return result


def largest_while_loading(path: Path, model_code: Any) -> int:
    read_ahead.PIECE = 3000
    with _Largest() as largest:
        load_model(path, mesh=init_device_mesh("cpu", (2,)), dtype=torch.bfloat16, model_code=model_code)
    return largest.nbytes


@pytest.mark.parametrize("model_code", ["native", "transformers"])
def test_no_matrix_is_whole_in_16_bits_on_a_rank(folder: Path, model_code: str) -> None:
    """The smallest that is quantized has 96 rows of 192 values; the largest has 320, of which a rank's are 4 bits."""
    smallest = 96 * 192 * 2
    assert max(run_ranks(largest_while_loading, 2, folder, model_code)) < smallest
