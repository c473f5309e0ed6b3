"""What one rank refuses while it loads, every rank refuses, in the same words, whatever the form of the checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter, save_adapter
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.distributed.agreement import Groups, groups_of, refused_by_all
from qsharded.nn import LoRAConfig
from tests.checkpoints import pack_by_bitsandbytes, write_checkpoint
from tests.distributed.harness import run_ranks

WEIGHT = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def in_form(form: str, folder: Path, target: Path) -> Path:
    """The checkpoint in ``folder`` in one of the forms that are read."""
    target.mkdir()
    if form == "16 bits":
        return write_checkpoint(target)
    if form.startswith("bitsandbytes"):
        return pack_by_bitsandbytes(folder, target, "nf4", 64, form == "bitsandbytes")
    quantize_checkpoint(folder, target, "qsharded", torch.device("cpu"))
    return target if form == "qsharded" else without_second_level(target, folder)


def without_second_level(packed: Path, folder: Path) -> Path:
    """Our form with fp32 absmax, as transformers' integration writes it, out of the doubly quantized one."""
    from qsharded.quant import formats

    weights, original = load_file(packed / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in [name for name in original if f"{name}_absmax" in weights]:
        del weights[f"{name}_absmax_scales"], weights[f"{name}_absmax_offset"]
        weights[f"{name}_absmax"] = formats.quantize(original[name], double_quant=False).absmax.view(torch.uint8)
    described = json.loads((packed / "config.json").read_text())
    described["quantization_config"]["double_quant"] = False
    (packed / "config.json").write_text(json.dumps(described))
    save_file(weights, packed / "model.safetensors", metadata={"format": "pt"})
    return packed


def damaged(folder: Path, name: str) -> None:
    """NaN in the last value of a tensor: in the rows of the last rank alone."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    values = weights[name].view(torch.float32) if weights[name].dtype == torch.uint8 else weights[name]
    values.view(-1)[-1] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


def refusal(path: Path, shape: tuple[int, ...]) -> str:
    dims = ("replicate", "shard")[-len(shape) :]
    with pytest.raises((ValueError, OSError)) as error:
        load_model(path, mesh=init_device_mesh("cpu", shape, mesh_dim_names=dims), dtype=torch.bfloat16)
    return str(error.value)


def refusals(paths: list[Path]) -> list[str]:
    """One after the other: after a refusal the ranks must still be in step."""
    return [refusal(path, (dist.get_world_size(),)) for path in paths]


def test_nan_in_the_last_ranks_rows_is_refused_by_all_in_every_form(folder: Path, tmp_path: Path) -> None:
    faults = {
        ("16 bits", WEIGHT),
        ("16 bits", "model.embed_tokens.weight"),
        ("16 bits", NORM),
        ("qsharded", f"{WEIGHT}_absmax_scales"),
        ("qsharded", "lm_head.weight"),
        ("qsharded, not nested", f"{WEIGHT}_absmax"),
        ("bitsandbytes", f"{WEIGHT}.nested_absmax"),
        ("bitsandbytes", "model.norm.weight"),
        ("bitsandbytes, not nested", f"{WEIGHT}.absmax"),
    }
    names = []
    for number, (form, name) in enumerate(sorted(faults)):
        damaged(in_form(form, folder, tmp_path / str(number)), name)
        names.append(name)
    paths = [tmp_path / str(number) for number in range(len(names))]
    for said in run_ranks(refusals, 3, paths):
        assert [sentence.partition(" holds NaN or infinity")[0] for sentence in said] == names


def failing_reads(fail: Callable[[str], None], rank: int) -> None:
    """Have reading fail on one rank alone, as a disk of its node would."""
    read = SafetensorsFolder.read_into

    def read_into(self: SafetensorsFolder, name: str, first: int, raw: Tensor) -> None:
        if dist.get_rank() == rank:
            fail(name)
        read(self, name, first, raw)

    SafetensorsFolder.read_into = read_into


def fail_of(name: str) -> None:
    if name.startswith(WEIGHT):
        raise OSError(5, "Input/output error", name)


def refusals_of_one_disk(paths: list[Path], rank: int, shape: tuple[int, ...]) -> list[str]:
    failing_reads(fail_of, rank)
    said = [refusal(path, shape) for path in paths]
    # and what is found before anything is read: here the other ranks see the whole folder, and one sees none of it
    here = paths[0] if dist.get_rank() != rank else paths[0] / "gone"
    return [*said, refusal(here, shape)]


@pytest.mark.parametrize(("shape", "rank"), [((2,), 1), ((2, 2), 2)])
def test_a_file_that_one_rank_cannot_read_is_named_by_all(
    folder: Path, tmp_path: Path, shape: tuple[int, ...], rank: int
) -> None:
    """Of replicas too, though a replica of whole rows needs nothing of the others."""
    forms = ["16 bits", "qsharded", "bitsandbytes, not nested"]
    paths = [in_form(form, folder, tmp_path / str(number)) for number, form in enumerate(forms)]
    first, *others = run_ranks(refusals_of_one_disk, 4 if len(shape) > 1 else 2, paths, rank, shape)
    assert all(said == first for said in others)
    assert [f"[Errno 5] Input/output error: '{WEIGHT}" in said for said in first] == [True] * 3 + [False]
    assert f"{paths[0] / 'gone'} is neither a folder nor a Hub id" in first[3]


def adapter_refusal(folder: Path, adapter: Path) -> str:
    """Rank 1 finds no adapter."""
    mesh = init_device_mesh("cpu", (2,))
    model = load_model(folder, mesh=mesh, lora=LoRAConfig(r=2), dtype=torch.float32)
    save_adapter(model, LoRAConfig(r=2), adapter, base_model="", is_main=dist.get_rank() == 0)
    dist.barrier()
    load_adapter(model, adapter)
    with pytest.raises(ValueError, match="is missing, damaged or incomplete") as error:
        load_adapter(model, adapter if dist.get_rank() == 0 else adapter / "gone")
    return str(error.value)


def test_an_adapter_that_one_rank_cannot_read_is_refused_by_all(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(adapter_refusal, 2, folder, tmp_path / "adapter")
    assert first == second
    assert str(tmp_path / "adapter" / "gone") in first


def raise_in_agreement(error: Exception | None, groups: Groups) -> None:
    with refused_by_all(groups, torch.device("cpu")):
        if error is not None:
            raise error


def first_of_two() -> tuple[str, str]:
    groups = groups_of(init_device_mesh("cpu", (3,)))
    own = [None, FileNotFoundError("of rank 1"), ValueError("of rank 2")][dist.get_rank()]
    with pytest.raises((ValueError, OSError)) as error:
        raise_in_agreement(own, groups)
    with refused_by_all(groups, torch.device("cpu")):
        pass
    return type(error.value).__name__, str(error.value)


def test_of_several_refusals_all_ranks_raise_the_first_ranks() -> None:
    assert run_ranks(first_of_two, 3) == [("OSError", "of rank 1")] * 3
