"""The compiled CUDA kernels against the reference, bit for bit."""

from typing import ClassVar

import pytest
import torch

from qsharded.quant import formats
from qsharded_kernels import cuda, cuda_nf4
from tests.kernels import cases
from tests.kernels.nf4_suite import NF4Suite

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_library", "needs_cuda_part")]


class TestCudaNF4(NF4Suite):
    kernels, device = cuda_nf4, "cuda"
    # beside the shared cases: a program's or warp's edge at 31 to 33 and 256 blocks, long rows, many rows
    shapes: ClassVar[list[tuple[int, int]]] = [
        *cases.SHAPES,
        (1, 31 * 64),
        (33, 64),
        (257, 64),
        (5, 28672),
        (1000, 576),
    ]

    @pytest.mark.parametrize("divisor", [1.0, 0.7, 3.1e-5])
    def test_quantize_around_every_threshold(self, divisor: float) -> None:
        """The 32 floats on either side of each midpoint, in blocks of any absmax."""
        steps = torch.arange(-32, 31, dtype=torch.int32)
        around = (formats.thresholds().view(torch.int32)[:, None] + steps).view(torch.float32)
        weight = torch.cat([torch.ones(15, 1), around], dim=1) * divisor
        self.assert_quantizes(weight)

    def test_quantize_unaligned_weight(self) -> None:
        weight = cases.random_weight((64, 128), torch.bfloat16).cuda()
        self.assert_quantizes(weight.flatten()[1 : 1 + 63 * 128].view(63, 128))

    def test_dequantize_into_given_memory(self) -> None:
        encoded = cases.double_quantized(7, 9)
        workspace = torch.full((8, 576), torch.nan, dtype=torch.bfloat16, device="cuda")
        out = cuda_nf4.dequantize(*self.arguments(encoded), torch.bfloat16, out=workspace[:7])
        assert out.data_ptr() == workspace.data_ptr()
        cases.assert_same_bits(workspace[:7].cpu(), encoded.expected(torch.bfloat16))
        assert workspace[7].isnan().all()

    @pytest.mark.parametrize("double_quant", [True, False], ids=["double", "fp32"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("r", [3, 16, 512])
    def test_parts_are_what_each_is_alone(self, r: int, dtype: torch.dtype, double_quant: bool) -> None:
        """Weights one below the other, and behind each its adapter's scaled B: there are 7 rows, a part without an
        adapter, one row, and room behind the rows that is not written."""
        rows, ranks, scale = (7, 300, 1, 33), (r, 0, r, 1), 0.7
        K, tail = 576, -(-sum(ranks) // 8) * 8
        generator = torch.Generator().manual_seed(r)
        expected = torch.full((sum(rows), K + tail + 16), torch.nan, dtype=torch.bfloat16, device="cuda")
        expected[:, K : K + tail] = 0
        out, parts, row, column = torch.full_like(expected, torch.nan), [], 0, 0
        for count, rank in zip(rows, ranks, strict=True):
            encoded = cases.double_quantized(count, K // 64)
            if not double_quant:
                encoded = cases.Encoded(
                    encoded.codes, encoded.dequantized_absmax, None, None, encoded.dequantized_absmax
                )
            arguments = self.arguments(encoded)
            B = torch.randn(count, rank, generator=generator).to(dtype).cuda() if rank else None
            parts.append((*arguments[:4], B, scale, column))
            own = expected[row : row + count]
            own[:, :K] = cuda_nf4.dequantize(*arguments, torch.bfloat16)
            if B is not None:
                torch.mul(B, scale, out=own[:, K + column : K + column + rank])
            row, column = row + count, column + rank
        codebook, absmax_map = arguments[4:]
        cuda_nf4.dequantize_parts(parts, codebook, absmax_map, out, tail)
        cases.assert_same_bits(out.cpu(), expected.cpu())

    def test_runs_on_the_current_stream_and_in_a_graph(self) -> None:
        encoded = cases.double_quantized(31, 9)
        arguments = self.arguments(encoded)
        out = torch.empty(31, 576, dtype=torch.bfloat16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda_nf4.dequantize(*arguments, torch.bfloat16, out=out)
        out.fill_(torch.nan)
        graph.replay()
        cases.assert_same_bits(out.cpu(), encoded.expected(torch.bfloat16))


def test_cuda_is_available_here() -> None:
    assert cuda.is_available()
    assert cuda.is_available("cuda:0")
