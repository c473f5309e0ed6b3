"""The operations on a GPU, fused or not: values, PyTorch's checks, graphs and memory. ``-m gpu`` runs them.

Axes: N = out_features, K = in_features, G = K/64 blocks in a row, M = rows of x.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.quant import backends, formats
from qsharded.quant.packed_weight import PackedWeight
from qsharded_kernels import fused_rows
from tests.kernels.cases import assert_same_bits, assert_within_an_ulp, random_weight
from tests.quant import flat

pytestmark = pytest.mark.gpu

Q = torch.ops.qsharded
N, K = 1000, 576
FEW, MANY = 5, 1024  # rows of x: what the fused kernel takes here, where there is one, and what it does not
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the output's own rounding, and the order of an fp32 sum: relative to the norms of what is multiplied; that of weights
# too where the product is fused, ten times what a sum of random ones comes to
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM_ERROR = 2**-18

Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def packed_weight(rows: int = N, columns: int = K) -> Packed:
    """Rows of absmax codes with a byte between them, as PackedLinear stores an odd number."""
    weight = formats.quantize(random_weight((rows, columns), torch.float32))
    assert weight.absmax_codes is not None
    codes, absmax, scales, offset = (
        tensor.cuda() for tensor in (weight.codes, weight.absmax_codes, weight.absmax_scales, weight.absmax_offset)
    )
    return codes, F.pad(absmax, (0, 1), value=255)[:, :-1], scales, offset


def dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    """By the reference on the CPU."""
    codes, absmax, scales, offset = (tensor.cpu() for tensor in packed)
    return formats.dequantize_blocks(codes, formats.dequantize_absmax(absmax, scales, offset), dtype).cuda()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to("cuda", dtype)
    return values.requires_grad_(requires_grad)


def fuses(packed: Packed, M: int, dtype: torch.dtype, quant_format: formats.QuantFormat = formats.NF4_64) -> bool:
    """Whether the weight, which is then rounded in a way of its own, is never dequantized for M rows."""
    weight = PackedWeight(*packed, quant_format)
    return any(kernels.multiplies(weight, M, dtype) for kernels in backends._kernels(weight.device))


def assert_close(actual: Tensor, left: Tensor, right: Tensor, *, fused: bool = False) -> None:
    """``actual`` = left @ right, but for its rounding and the sums', and that of a fused product's weights."""
    expected = left.double() @ right.double()
    sizes = left.double().norm(dim=1)[:, None] * right.double().norm(dim=0)
    rounding = ROUNDING[actual.dtype]
    allowed = SUM_ERROR + (5 * rounding / left.shape[1] ** 0.5 if fused else 0)
    excess = (actual.double() - expected).abs() - expected.abs() * rounding - sizes * allowed
    assert bool((excess <= 0).all()), f"{(~(excess <= 0)).sum()} of {actual.numel()} are off, by up to {excess.max()}"


@pytest.fixture(autouse=True)
def few_rows_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table says of this card and of weights as small as these."""
    monkeypatch.setattr(fused_rows, "most_rows", lambda N, K, device: 64)


@pytest.fixture(autouse=True)
def fp32_sums() -> Iterator[None]:
    """cuBLAS may add the parts of a long sum in 16 bits unless told not to."""
    cublas = torch.backends.cuda.matmul
    before = cublas.allow_bf16_reduced_precision_reduction, cublas.allow_fp16_reduced_precision_reduction
    cublas.allow_bf16_reduced_precision_reduction = cublas.allow_fp16_reduced_precision_reduction = False
    yield
    cublas.allow_bf16_reduced_precision_reduction, cublas.allow_fp16_reduced_precision_reduction = before


@pytest.fixture(params=["fastest", "triton", "reference"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fastest":
        return
    served = {name: (kernels,) for name, kernels in backends.implementations(torch.device("cuda", 0)).items()}
    monkeypatch.setattr(backends, "_kernels", lambda device: (served | {"reference": ()})[request.param])


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 16, 300])
def test_identity_activations_give_the_weight(M: int, dtype: torch.dtype) -> None:
    """Dequantized first bit for bit."""
    packed = packed_weight()
    weight = dequantized(packed, dtype)
    identity = torch.eye(K, dtype=dtype, device="cuda")
    found = torch.cat([flat.nf4_linear(rows, *packed).T for rows in identity.split(M)], dim=1)
    if fuses(packed, M, dtype):
        assert_within_an_ulp(found, dequantized(packed, torch.float32))
    else:
        assert torch.equal(found, weight)  # by value: a sum that starts at 0 has no -0
    assert torch.equal(Q.nf4_linear_input_grad(torch.eye(N, dtype=dtype, device="cuda"), *packed), weight)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [FEW, MANY])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2880), (7, 576), (1000, 2880)])
def test_output_and_gradient(rows: int, columns: int, M: int, dtype: torch.dtype) -> None:
    packed = packed_weight(rows, columns)
    weight = dequantized(packed, dtype)
    x, grad = random(M, columns, dtype=dtype, requires_grad=True), random(M, rows, dtype=dtype)
    y = flat.nf4_linear(x, *packed)
    y.backward(grad)
    fused = fuses(packed, M, dtype)
    multiplied = dequantized(packed, torch.float32) if fused else weight
    assert_close(y.detach(), x.detach(), multiplied.T, fused=fused)
    assert_close(x.grad, grad, weight)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("M", [1, FEW, MANY])
@pytest.mark.parametrize(("quant_type", "block_size"), [("fp4", 64), ("fp4", 32), ("nf4", 128), ("fp4", 4096)])
def test_other_kinds(quant_type: str, block_size: int, M: int, double_quant: bool) -> None:
    """Rows of 9 blocks, or of one; quantized on the GPU to the bytes of the CPU."""
    columns = block_size * (1 if block_size == 4096 else 9)
    dense = random_weight((70, columns), torch.float32)
    kind = {"quant_type": quant_type, "block_size": block_size}
    expected = formats.quantize(dense, **kind, double_quant=double_quant)
    codes, absmax = flat.nf4_quantize(dense.cuda(), **kind)
    assert_same_bits(codes.cpu(), expected.codes)
    assert_same_bits(absmax.cpu(), formats.quantize_blocks(dense, expected.quant_format)[1])
    second_level = expected.absmax_codes, expected.absmax_scales, expected.absmax_offset
    packed = (codes, *(t.cuda() for t in second_level)) if double_quant else (codes, absmax, None, None)
    weight = expected.dequantize(torch.bfloat16).cuda()
    assert_same_bits(flat.nf4_dequantize(*packed, torch.bfloat16, **kind), weight)
    x, grad = random(M, columns, requires_grad=True), random(M, 70)
    y = flat.nf4_linear(x, *packed, **kind)
    y.backward(grad)
    fused = fuses(packed, M, x.dtype, expected.quant_format)
    multiplied = expected.dequantize(torch.float32).cuda() if fused else weight
    assert_close(y.detach(), x.detach(), multiplied.T, fused=fused)
    assert_close(x.grad, grad, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    packed, x = packed_weight(), random(2, 3, K, dtype=dtype, requires_grad=True)
    torch.library.opcheck(Q.nf4_quantize, (random_weight((3, 192), dtype).cuda(),))
    torch.library.opcheck(Q.nf4_dequantize, (*packed, dtype))
    torch.library.opcheck(Q.nf4_linear.default, (x, *packed, random(N, dtype=dtype, requires_grad=True)))
    torch.library.opcheck(Q.nf4_linear_input_grad, (random(2, 3, N, dtype=dtype), *packed))


def test_gradients_by_finite_differences() -> None:
    packed = packed_weight(7, 128)
    x, bias = random(2, 128, dtype=torch.float64, requires_grad=True), random(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: flat.nf4_linear(x, *packed, bias), x)


@pytest.mark.parametrize("M", [FEW, MANY])
def test_compiles_whole_to_the_same(M: int) -> None:
    packed = packed_weight()
    compiled = torch.compile(flat.nf4_linear, fullgraph=True)
    results = []
    for function in (flat.nf4_linear, compiled):
        x = random(M, K, requires_grad=True)
        y = function(x, *packed)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad))
    for eager, traced in zip(*results, strict=True):
        assert_same_bits(traced, eager)


@pytest.mark.parametrize("M", [FEW, MANY])
def test_a_captured_step_replays(M: int) -> None:
    """Forward and the gradient's product, with new activations in the same place."""
    packed, x = packed_weight(), random(M, K)

    def step() -> tuple[Tensor, Tensor]:
        y = Q.nf4_linear(x, *packed, None)
        return y, Q.nf4_linear_input_grad(y, *packed)

    step()  # tables and the libraries' own state are made outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(random(M + 1, K)[1:])
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert_same_bits(replayed, eager)


def test_side_streams_share_no_dequantized_weight() -> None:
    """Two streams that dequantize side by side: each result is its own weight's."""
    weights = [packed_weight(N, K), packed_weight(N + 8, K)]
    x = random(MANY, K)
    expected = [flat.nf4_linear(x, *packed) for packed in weights]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, packed in zip(streams, weights, strict=True):
            with torch.cuda.stream(stream):
                results.append(flat.nf4_linear(x, *packed))
        torch.cuda.synchronize()
        for actual, wanted in zip(results, expected, strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.parametrize("run", [lambda x, p: flat.nf4_linear(x, *p), lambda x, p: Q.nf4_linear_input_grad(x, *p)])
def test_one_dequantized_weight_at_a_time(run: Callable[[Tensor, Packed], Tensor]) -> None:
    """A chain of layers takes the memory of one dequantized weight, and the allocator takes no more from the device."""
    size = 2 * MANY  # so that a second dequantized weight outweighs what the bound leaves for outputs
    layers = [packed_weight(size, size)] * 4

    def chain(x: Tensor) -> Tensor:
        for packed in layers:
            x = run(x, packed) / 32
        return x

    x = random(MANY, size)
    chain(x)
    torch.cuda.synchronize()
    reserved, before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    chain(x)
    outputs, weight = 3 * x.nbytes, 2 * size * size  # of a layer: input, product, scaled product
    assert torch.cuda.max_memory_allocated() - before <= outputs + weight + 2**16
    assert torch.cuda.memory_reserved() == reserved
