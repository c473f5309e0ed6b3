"""The fused product against fp64 products of the exact weights, which the GPU computes too."""

import re
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from qsharded.quant import formats
from qsharded.quant.codebooks import CODEBOOKS
from qsharded.quant.own_kernels import CompiledCuda, rounding_factor
from qsharded_kernels import cuda_linear, cuda_nf4, library
from tests.kernels import cases, packed_products

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_library", "needs_cuda_part", "poisoned_outputs")]

DTYPES = cuda_linear.DTYPES
# around the edges of every tile of rows of x
ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300]
# rows and blocks in a row: one output, fewer rows than a batch or a box, no multiple of any tile; odd numbers of
# blocks; chunks and boxes of absmax that end early; a tile that many thread blocks share, and several tiles for each;
# rows that a thread block takes several passes for; on an H200 each configuration of tiles
SMALL = [(1, 1), (7, 16), (7, 45), (33, 5), (1000, 9), (520, 45), (300, 64), (300, 230), (4100, 16)]
LARGE = [(1000, 140), (8200, 64), (14300, 20), (4100, 256), (17000, 128)]
# shared memory that other cards allow a thread block, by which kernels are chosen
OTHER_CARDS = {"A100": 163 << 10, "RTX": 99 << 10}
# the output's own rounding, relative to it; that of weights, whose errors are as good as random: ten times what a sum
# of them comes to, relative to |x||w| / sqrt(K), where each weight is off by a quarter of an ulp
OUTPUT_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
WEIGHT_ROUNDING = {dtype: 10 * rounding / 2 for dtype, rounding in OUTPUT_ROUNDING.items()}
SUM_ERROR = 2**-20  # of fp32 sums, relative to |x||w|

Arguments = list[Tensor | None]


def on_gpu(encoded: cases.Encoded) -> tuple[Arguments, Tensor]:
    """What the product takes, with its strides, which ``to`` alone would drop, and the weight in fp32."""

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)

    arguments = [tensor if tensor is None else move(tensor) for tensor in encoded.arguments()]
    quant_format = formats.QuantFormat(encoded.quant_type)
    absmax = encoded.dequantized_absmax.cuda()
    return arguments, formats.dequantize_blocks(arguments[0], absmax, torch.float32, quant_format)


@lru_cache(maxsize=4)
def random_weight(N: int, G: int, boxed: bool) -> tuple[Arguments, Tensor]:
    """``boxed``: with absmax rows of a multiple of 16 bytes, and more: what the copy engine asks for; else they come by
    loads."""
    return on_gpu(cases.double_quantized(N, G, gap=16 + -G % 16 if boxed else 1))


@lru_cache(maxsize=4)
def packed(quant_type: str) -> tuple[packed_products.PackedWeight, Tensor]:
    """And the weight in fp64."""
    weight = packed_products.packed(4096, 2048, quant_type)
    return weight, packed_products.exact(weight)


def random_rows(M: int, K: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(M), device="cuda").to(dtype)


def linear(x: Tensor, arguments: Arguments, bias: Tensor | None = None, quant_type: str = "nf4") -> Tensor:
    return cuda_linear.linear(x, *arguments, bias, factor=rounding_factor(quant_type, x.dtype))


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of the output, of weights and of sums. ``weight``: in fp32, on the GPU."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + (0 if bias is None else bias.double().abs())
    allowed = SUM_ERROR + WEIGHT_ROUNDING[y.dtype] / x.shape[1] ** 0.5
    excess = (y.double() - expected).abs() - expected.abs() * OUTPUT_ROUNDING[y.dtype] - sizes * allowed
    wrong = (~(excess <= 0)).sum()
    assert wrong == 0, f"{len(x)} rows of x: {wrong} of {y.numel()} are off, by up to {excess.max()}"


def assert_products(N: int, G: int, boxed: bool) -> None:
    arguments, weight = random_weight(N, G, boxed)
    for M in ROWS:
        x = random_rows(M, G * 64, torch.bfloat16)
        assert_product(linear(x, arguments), x, weight)


@pytest.fixture
def _as_on(card: str | None) -> Iterator[None]:
    """Kernels are chosen as on this card."""
    compiled = library.load()
    assert compiled is not None
    compiled.qsharded_cuda_nf4_linear_assume(OTHER_CARDS.get(card, 2**31 - 1))
    cuda_linear._workspace_bytes.cache_clear()
    yield
    compiled.qsharded_cuda_nf4_linear_assume(2**31 - 1)
    cuda_linear._workspace_bytes.cache_clear()


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(("N", "G"), SMALL + LARGE)
def test_product(N: int, G: int, boxed: bool) -> None:
    assert_products(N, G, boxed)


@pytest.mark.usefixtures("_as_on")
@pytest.mark.parametrize("card", OTHER_CARDS)
@pytest.mark.parametrize(("N", "G"), [*SMALL, (8200, 64)])
def test_product_by_the_kernels_of_other_cards(N: int, G: int, card: str) -> None:
    assert_products(N, G, boxed=False)


@pytest.mark.usefixtures("_as_on")
@pytest.mark.parametrize("card", [None, *OTHER_CARDS])
@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_returns_the_weight(dtype: torch.dtype, boxed: bool, card: str | None) -> None:
    arguments, weight = random_weight(300, 9, boxed)
    identity = torch.eye(576, dtype=dtype, device="cuda")
    for M in (1, 8, 16, 32, 64, 128, 256):
        columns = [linear(rows, arguments).T for rows in identity.split(M)]
        cases.assert_within_an_ulp(torch.cat(columns, dim=1), weight)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_bytes(dtype: torch.dtype, quant_type: str, contiguous: bool) -> None:
    """Under fp32 absmax in strided rows or contiguous ones, of magnitudes that the dtype holds."""
    arguments, _ = on_gpu(cases.every_pair_of_bytes(quant_type))
    arguments[1].clamp_(2.0**-10, 2.0**10)
    if contiguous:
        arguments[1] = arguments[1].contiguous()
    weight = cuda_nf4.dequantize(*arguments, torch.float32)
    identity = torch.eye(512, dtype=dtype, device="cuda")
    for M in (1, 8, 16, 32, 64, 128, 256):
        columns = [linear(rows, arguments, quant_type=quant_type).T for rows in identity.split(M)]
        cases.assert_within_an_ulp(torch.cat(columns, dim=1), weight)


@pytest.mark.usefixtures("_as_on")
@pytest.mark.parametrize("card", [None, *OTHER_CARDS])
@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", packed_products.KINDS)
def test_its_error_is_no_larger_than_that_of_decoding_first(
    kind: str, dtype: torch.dtype, quant_type: str, card: str | None
) -> None:
    weight, exact = packed(quant_type)
    for M in (1, 8, 16, 32, 64, 128):
        x = packed_products.activations(kind, M, exact, dtype)
        y = CompiledCuda().linear(x, weight, None)
        packed_products.assert_errs_no_more(y, x, exact, room=1.01)  # sums in another order


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("M", [1, 3, 16, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype: torch.dtype, M: int, boxed: bool) -> None:
    arguments, weight = random_weight(1000, 9, boxed)
    x, bias = random_rows(M, 576, dtype), random_rows(1, 1000, dtype)[0]
    assert_product(linear(x, arguments, bias), x, weight, bias)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("M", [1, 5, 16, 32, 33, 100, 256])
def test_same_bits_in_every_run(M: int, boxed: bool) -> None:
    arguments, _ = random_weight(4100, 64, boxed)
    x = random_rows(M, 4096, torch.bfloat16)
    first = linear(x, arguments)
    for _ in range(20):
        cases.assert_same_bits(linear(x, arguments), first)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("M", [1, 5, 16, 64, 256])
def test_graph_replays(M: int, boxed: bool) -> None:
    arguments, _ = random_weight(4100, 64, boxed)
    x = random_rows(M, 4096, torch.bfloat16)
    expected = linear(x, arguments)
    torch.use_deterministic_algorithms(False)  # its fills are no part of what is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, arguments)
    y.fill_(float("nan"))
    graph.replay()
    cases.assert_same_bits(y, expected)


@pytest.mark.usefixtures("_as_on")
@pytest.mark.parametrize(
    ("N", "G", "kernels", "card"),
    [
        (1000, 140, {1: "linear_vector_small_kernel", 8: "Stream32x8", 32: "Stream32x16", 64: "Stream64x32"}, None),
        (300, 64, {32: "Stream64x32"}, None),
        (8200, 64, {1: "Stream64x8", 16: "Stream64x16", 32: "Wgmma32", 64: "Wgmma64", 65: "Wgmma128"}, None),
        (14300, 20, {8: "Stream112x8", 16: "Stream112x16", 32: "Stream112x16", 129: "Wgmma256"}, None),
        (4100, 256, {8: "Stream128x8", 16: "Stream128x16"}, None),
        (17000, 128, {8: "Stream128x8", 32: "Wgmma32Large", 64: "Wgmma64Large"}, None),
        (8200, 64, {1: "linear_vector_kernel", 8: "Mma128x8", 16: "Mma128x16"}, "A100"),
        (4100, 16, {1: "linear_vector_small_kernel"}, "A100"),
        (8200, 64, {1: "Mma128x8", 300: "Mma128x16"}, "RTX"),
    ],
)
def test_configurations_on_hopper(N: int, G: int, kernels: dict[int, str], card: str | None) -> None:
    """Another would give sums as good, and nobody would notice."""
    properties = torch.cuda.get_device_properties(0)
    if (properties.major, properties.minor, properties.multi_processor_count) != (9, 0, 132):
        pytest.skip("needs a card of compute capability 9.0 and 132 SMs")
    arguments, _ = random_weight(N, G, boxed=False)
    for M, kernel in kernels.items():
        x = random_rows(M, G * 64, torch.bfloat16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            linear(x, arguments)
            torch.cuda.synchronize()
        ran = [event.key for event in profile.key_averages()]
        assert any(re.search(rf"{kernel}([EI]|\W)", name) for name in ran), (M, ran)  # mangled or not


def test_views() -> None:
    """x transposed, x at an odd address, codes at an odd address."""
    arguments, weight = random_weight(64, 9, boxed=False)
    transposed = random_rows(576, 5, torch.bfloat16).T
    assert_product(linear(transposed, arguments), transposed, weight)
    shifted = random_rows(2, 577, torch.bfloat16)[:1, 1:].expand(2, 576)
    assert_product(linear(shifted, arguments), shifted, weight)
    storage = torch.empty(arguments[0].numel() + 1, dtype=torch.uint8, device="cuda")
    codes = storage[1:].view_as(arguments[0]).copy_(arguments[0])
    assert_product(linear(shifted, [codes, *arguments[1:]]), shifted, weight)


@pytest.mark.parametrize(("M", "N"), [(0, 64), (5, 0)])
def test_nothing_to_do(M: int, N: int) -> None:
    arguments, _ = random_weight(N, 9, boxed=False)
    assert linear(random_rows(M, 576, torch.bfloat16), arguments).shape == (M, N)


@pytest.mark.parametrize("M", [1, 5, 100])
def test_beyond_32_bits(M: int) -> None:
    """Codes of 4 GiB and more: 2^33 weights and 64 rows over."""
    N, G = 2**17 + 64, 1024
    codes = torch.randint(256, (N, G * 32), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(256, (N, G), dtype=torch.uint8, device="cuda")
    scales = torch.rand(N * G // 256, device="cuda")
    _, _, _, offset, codebook, absmax_map = random_weight(1, 1, boxed=False)[0]
    x = random_rows(M, G * 64, torch.bfloat16)
    y = linear(x, [codes, absmax, scales, offset, codebook, absmax_map])
    for rows in (slice(0, 64), slice(N - 64, N)):
        block = slice(rows.start * G // 256, rows.stop * G // 256)
        packed = codes[rows], absmax[rows], scales[block], offset, codebook, absmax_map
        weight = cuda_nf4.dequantize(*packed, torch.float32)
        assert_product(y[:, rows], x, weight)
