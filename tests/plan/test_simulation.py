"""Bytes that are alive, against sums done by hand."""

import pytest
import torch
from torch import nn

from qsharded.nn import PackedLinear
from qsharded.plan.simulation import LiveBytes, as_on_gpu
from qsharded.quant import formats


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_storages_count_while_they_live(device: str) -> None:
    x = torch.empty(1000, device=device)  # was there before
    with LiveBytes() as live:
        y = x * 2
        assert live.now() == 4000
        z = y.view(10, 100)  # y's own storage
        w = z.to(torch.float64)
        assert live.now() == 12000
        del y, z
        assert live.now() == 8000
        w.add_(1)
        assert (live.now(), live.peak) == (8000, 12000)


def test_a_view_of_what_was_there_before_does_not_count() -> None:
    x = torch.empty(10, 10)
    with LiveBytes([x]) as live:
        assert x.T.view(torch.int32) is not None
        assert live.peak == 0


def test_backward_lets_go_of_what_it_has_used() -> None:
    x = torch.empty(1000, device="meta", requires_grad=True)
    with LiveBytes([x]) as live:
        y = x.sin().exp()  # keeps its output; sin keeps x
        assert live.now() == 4000
        y.sum().backward()
        del y
        assert live.now() == 4000  # x.grad


def test_a_packed_weight_is_dequantized_inside_its_product() -> None:
    layer = PackedLinear(128, 320, bias=False, device="meta")
    x = torch.empty(7, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with LiveBytes([x, *layer.parameters(), *layer.buffers()]) as live:
        y = layer(x)
        assert live.peak == 7 * 320 * 2 + 320 * 128 * 2
        assert live.now() == 7 * 320 * 2
        y.backward(torch.empty_like(y))
        # y and the gradients by y and x, while the weight is dequantized again
        assert live.peak == 7 * (2 * 320 + 128) * 2 + 320 * 128 * 2


def test_other_blocks_are_dequantized_by_plain_pytorch_in_chunks() -> None:
    layer = PackedLinear(128, 320, bias=False, block_size=32, device="meta")
    x = torch.empty(7, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    codes, absmax, _, _ = (
        PackedLinear.from_linear(nn.Linear(128, 320), block_size=32, double_quant=False).packed().tensors
    )
    formats.dequantize_blocks(codes, absmax, torch.bfloat16, layer.quant_format)  # its table is made once, and stays
    with LiveBytes([codes, absmax]) as real:
        formats.dequantize_blocks(codes, absmax, torch.bfloat16, layer.quant_format)
    with LiveBytes([x, *layer.parameters(), *layer.buffers()]) as live:
        layer(x)
    output = 7 * 320 * 2
    assert live.peak == output + real.peak
    fp4 = PackedLinear(128, 320, bias=False, quant_type="fp4", device="meta")
    with LiveBytes([x, *fp4.parameters(), *fp4.buffers()]) as live:
        fp4(x)  # the kernels dequantize it
    assert live.peak == output + 320 * 128 * 2
    wide = PackedLinear(2**13, 2**12, bias=False, block_size=128, device="meta")
    x = torch.empty(1, 2**13, dtype=torch.bfloat16, device="meta")
    with LiveBytes([x, *wide.parameters(), *wide.buffers()]) as live:
        wide(x)
    assert live.peak == 2**12 * 2 + 2**25 * 2 + 2**24 * 8


def test_fused_norms_keep_their_input_and_a_figure_a_row() -> None:
    norm = nn.RMSNorm(64, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    as_on_gpu(norm)
    x = torch.empty(5, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with LiveBytes([x, norm.weight]) as live:
        y = norm(x)
        assert live.now() == 5 * 64 * 2 + 5 * 4
        y.backward(torch.empty_like(y))
        assert x.grad is not None
