"""The walk through a decoder gives every layer the inputs that the whole model gives it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qsharded.calibration.layer_inputs import LayerInputs
from qsharded.calibration.layer_walk import LayerWalk
from qsharded.checkpoint import load_model
from qsharded.checkpoint.load import skeleton
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.models.choice import read_config
from qsharded.quant.formats import NF4_64
from qsharded.quant.linear import PackedLinear
from qsharded.utils.untrusted_json import read_json
from tests.checkpoints import write_checkpoint
from tests.models.architectures import write_architecture

CPU = torch.device("cpu")


def checkpoint(folder: Path, architecture: str) -> Path:
    if architecture == "llama":
        return write_checkpoint(folder, tie_word_embeddings=True)
    return write_architecture(folder, architecture)


def moments_of_the_model(folder: Path, ids_RS: Tensor) -> dict[str, Tensor]:
    """The sum of x^T x of every packed layer's inputs, and the number of tokens of each."""
    model = load_model(folder, dtype=torch.float32, device="cpu").eval()
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x_TK = x.flatten(0, -2)
        found[name] = found.get(name, torch.zeros(1)) + x_TK.T @ x_TK

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.register_forward_pre_hook(lambda _, args, name=name: add(f"{name}.weight", args[0]))
    with torch.no_grad():
        for ids_S in ids_RS:  # a row at a time, unlike the walk
            model(ids_S[None])
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "granitemoe"])
def test_layers_see_what_they_see_in_the_model(architecture: str, tmp_path: Path) -> None:
    """Layers of one window and of another; experts in one tensor beside linear layers; a norm behind the last."""
    folder = checkpoint(tmp_path, architecture)
    config, source = open_tied(folder, read_config(read_json(folder / "config.json")))
    ids_RS = torch.randint(config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    model = skeleton(config, None, torch.float32, quant_format=None).eval()
    walk = LayerWalk(model, source, ids_RS, CPU, NF4_64)
    packed = load_model(folder, dtype=torch.float32, device="cpu")
    seen: dict[str, Tensor] = {}
    groups = 0
    walk.begin()
    for number in range(len(walk.layers)):
        with walk.in_memory(number) as layer:
            named = {walk.name(number, name): module for name, module in layer.named_modules()}
            linears = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
            for name in [*linears]:
                original = packed.get_submodule(name.removesuffix(".weight"))
                if isinstance(original, PackedLinear):
                    linears[name].weight.data = original.dequantize(torch.float32)
                else:
                    del linears[name]
            inputs = LayerInputs(linears)
            with inputs.watched():
                walk.run(number, keep=True)
            for moments, names in inputs.groups():
                groups += 1
                seen |= dict.fromkeys(names, moments.sum_KK)
        assert all(parameter.is_meta for parameter in layer.parameters())
    expected = moments_of_the_model(folder, ids_RS)
    assert seen.keys() == expected.keys()
    for name, moments in expected.items():
        torch.testing.assert_close(seen[name], moments, rtol=1e-4, atol=1e-4 * moments.abs().max().item())
    if architecture == "llama":
        assert groups == 2 * 4  # q, k and v; o; gate and up; down


def test_a_model_whose_layers_give_something_else_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "bamba")
    config, source = open_tied(folder, read_config(read_json(folder / "config.json")))
    model = skeleton(config, None, torch.float32, quant_format=None).eval()
    walk = LayerWalk(model, source, torch.zeros(1, 8, dtype=torch.long), CPU)
    walk.begin()
    with walk.in_memory(0):
        walk.run(0, keep=True)
    with walk.in_memory(1), pytest.raises(ValueError, match="bamba: its code does not pass hidden states"):
        walk.run(1, keep=True)
