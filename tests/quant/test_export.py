"""PackedLinear goes through torch.export and ahead-of-time compilation, its bytes and results unchanged."""

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsharded


def packed(*sizes: int, **kind: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(K, N, bias=True) for K, N in itertools.pairwise(sizes)]
    return qsharded.quantize_(nn.Sequential(*layers).bfloat16(), **kind).eval()


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", [{}, {"quant_type": "fp4", "block_size": 32}])
def test_export_keeps_results_for_any_number_of_rows_and_bytes_through_a_file(kind: dict[str, Any]) -> None:
    model, x = packed(192, 320, 75, **kind), torch.randn(3, 192).bfloat16()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert f"qsharded.nf4_linear.{'kind' if kind else 'default'}" in called
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    for rows in (x, torch.cat([x, -x])):
        assert torch.equal(again.module()(rows), model(rows))
    assert again.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(as_bytes(again.state_dict[name]), as_bytes(t)) for name, t in model.state_dict().items())


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's loader of such packages crashes on a CPU")
@pytest.mark.slow
def test_ahead_of_time_compiled_it_gives_the_same(tmp_path: Path) -> None:
    model, x = packed(128, 33), torch.randn(3, 128).bfloat16()
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    assert torch.equal(compiled(x), model(x))
