"""The operations against dense products with the dequantized weight, and PyTorch's own checks of their registration.

Axes: N = out_features, K = in_features, G = K/64 blocks in a row.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from qsharded.quant import backends, formats
from tests.kernels.cases import assert_same_bits, hard_weight, random_weight
from tests.quant import flat

N, K = 40, 576  # 9 blocks a row, 360 in all: the second second-level block is a part of one
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q = torch.ops.qsharded

# Of fp32: sums of K or fewer terms in another order. Of bf16: both sides round an fp32 sum once, so they may end up on
# two sides of a rounding boundary, 2**-8 apart; near 0 what counts is the size of the terms, about 1.
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}

Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def single() -> Packed:
    packed = formats.quantize(random_weight((N, K), torch.float32), double_quant=False)
    return packed.codes, packed.absmax, None, None


def double() -> Packed:
    packed = formats.quantize(random_weight((N, K), torch.float32))
    assert packed.absmax_codes is not None
    return packed.codes, packed.absmax_codes, packed.absmax_scales, packed.absmax_offset


def strided() -> Packed:
    """As PackedLinear stores it: rows of 9 absmax codes, 10 bytes apart."""
    codes, absmax, scales, offset = double()
    return codes, F.pad(absmax, (0, 1), value=255)[:, :9], scales, offset


every_packing = pytest.mark.parametrize("packing", [single, double, strided])
both_schemas = pytest.mark.parametrize("packing", [single, strided])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
fp32_and_bf16 = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


@pytest.fixture(params=["fastest", "reference"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the implementation that this machine takes and plain PyTorch."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "_kernels", lambda device: ())


def random(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    return values.requires_grad_(requires_grad)


def dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    codes, absmax, scales, offset = packed
    if scales is not None and offset is not None:
        absmax = formats.dequantize_absmax(absmax, scales, offset)
    return formats.dequantize_blocks(codes, absmax, dtype)


# --- values ---


@pytest.mark.usefixtures("_backend")
@every_dtype
@pytest.mark.parametrize("make", [hard_weight, lambda dtype: random_weight((N, K), dtype)], ids=["hard", "random"])
def test_quantize_is_the_reference_to_the_byte(make: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    weight = make(dtype)
    for actual, expected in zip(flat.nf4_quantize(weight), formats.quantize_blocks(weight), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.usefixtures("_backend")
@every_dtype
@every_packing
def test_dequantize_is_the_reference_to_the_bit(packing: Callable[[], Packed], dtype: torch.dtype) -> None:
    packed = packing()
    assert_same_bits(flat.nf4_dequantize(*packed, dtype=dtype), dequantized(packed, dtype))


def test_dequantize_is_bf16_unless_told() -> None:
    codes, absmax, _, _ = single()
    assert flat.nf4_dequantize(codes, absmax).dtype == torch.bfloat16


@pytest.mark.usefixtures("_backend")
@every_dtype
@every_packing
def test_identity_activations_give_the_weight_bit_for_bit(packing: Callable[[], Packed], dtype: torch.dtype) -> None:
    packed = packing()
    weight = dequantized(packed, dtype)
    assert torch.equal(flat.nf4_linear(torch.eye(K, dtype=dtype), *packed), weight.t())
    assert torch.equal(Q.nf4_linear_input_grad(torch.eye(N, dtype=dtype), *packed), weight)


# --- gradients ---


@pytest.mark.usefixtures("_backend")
@fp32_and_bf16
@every_packing
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K)], ids=len)
def test_output_and_gradients_are_those_of_a_dense_layer(
    shape: tuple[int, ...], packing: Callable[[], Packed], dtype: torch.dtype
) -> None:
    """In fp64, where the dense layer errs by nothing. The output's gradient is weighted, to tell its entries apart."""
    packed = packing()
    x, bias = random(*shape, dtype=dtype, requires_grad=True), random(N, dtype=dtype, requires_grad=True)
    weights = random(*shape[:-1], N, dtype=dtype) / 20
    (flat.nf4_linear(x, *packed, bias) * weights).sum().backward()

    dense_x, dense_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    dense = F.linear(dense_x, dequantized(packed, dtype).double(), dense_bias)
    (dense * weights.double()).sum().backward()
    scale = K**0.5  # the output's size: sqrt(K) products of size 1
    actual = flat.nf4_linear(x, *packed, bias).detach()
    torch.testing.assert_close(actual.double() / scale, dense.detach() / scale, **TOLERANCES[dtype])
    for ours, theirs in ((x.grad, dense_x.grad), (bias.grad, dense_bias.grad)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCES[dtype])


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("M", [1, 2, 300])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2880), (7, 576), (1000, 2880)])
def test_output_of_other_sizes(rows: int, columns: int, M: int) -> None:
    weight = formats.quantize(random_weight((rows, columns), torch.float32))
    packed = weight.codes, weight.absmax_codes, weight.absmax_scales, weight.absmax_offset
    x = random(M, columns)
    expected = x.double() @ dequantized(packed, torch.float32).double().T
    scale = columns**0.5
    actual = flat.nf4_linear(x, *packed).double()
    torch.testing.assert_close(actual / scale, expected / scale, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_only_the_gradient_asked_for_is_made(wanted: str) -> None:
    x, bias = random(3, K, requires_grad=wanted == "x"), random(N, requires_grad=wanted == "bias")
    flat.nf4_linear(x, *double(), bias).sum().backward()
    assert (x.grad is not None) == (wanted == "x")
    assert (bias.grad is not None) == (wanted == "bias")


def test_backward_keeps_the_packed_weight_and_nothing_dequantized() -> None:
    packed = double()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        flat.nf4_linear(random(3, K, requires_grad=True), *packed, random(N))
    packed_storage = {t.data_ptr() for t in packed if t is not None}
    assert {t.data_ptr() for t in saved} == packed_storage


@pytest.mark.filterwarnings("error")
def test_the_gradient_has_a_gradient() -> None:
    packed = double()
    x, upstream = random(3, K, requires_grad=True), random(3, N, requires_grad=True)
    (gradient,) = torch.autograd.grad(flat.nf4_linear(x, *packed), x, upstream, create_graph=True)
    probe = random(3, K) + 1
    (gradient * probe).sum().backward()
    torch.testing.assert_close(upstream.grad, probe @ dequantized(packed, torch.float32).t(), rtol=1e-5, atol=1e-4)


def test_gradients_and_their_gradients_by_finite_differences() -> None:
    """In fp64, which the reference serves whatever kernels there are."""
    packed = formats.quantize(random_weight((7, 128), torch.float32))
    arguments = packed.codes, packed.absmax_codes, packed.absmax_scales, packed.absmax_offset
    x, bias = (random(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 128), (7,)))
    assert torch.autograd.gradcheck(lambda x, bias: flat.nf4_linear(x, *arguments, bias), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: flat.nf4_linear(x, *arguments, bias), (x, bias))


@every_packing
def test_fp64_holds_the_fp32_weight(packing: Callable[[], Packed]) -> None:
    packed = packing()
    assert_same_bits(flat.nf4_dequantize(*packed, dtype=torch.float64), dequantized(packed, torch.float32).double())


# --- FP4, and other blocks ---

# rows of 3 blocks, whose absmax PackedLinear pads, and of 1
OTHER_KINDS = [("fp4", 64, 3), ("nf4", 32, 3), ("fp4", 128, 1), ("nf4", 4096, 1)]
other_kinds = pytest.mark.parametrize(("quant_type", "block_size", "blocks"), OTHER_KINDS)
nested_or_not = pytest.mark.parametrize("double_quant", [True, False])


def packed_weight(
    quant_type: str, block_size: int, blocks: int, double_quant: bool
) -> tuple[formats.ReferenceWeight, Packed]:
    weight = random_weight((N, blocks * block_size), torch.float32)
    kind = {"quant_type": quant_type, "block_size": block_size}
    packed = formats.quantize(weight, **kind, double_quant=double_quant)
    absmax = packed.absmax_codes if double_quant else packed.absmax
    return packed, (packed.codes, absmax, packed.absmax_scales, packed.absmax_offset)


@other_kinds
@nested_or_not
def test_other_kinds_are_computed_with_their_dequantized_weight(
    quant_type: str, block_size: int, blocks: int, double_quant: bool
) -> None:
    expected, packed = packed_weight(quant_type, block_size, blocks, double_quant)
    size = blocks * block_size
    weight = random_weight((N, size), torch.float32)
    codes, absmax = flat.nf4_quantize(weight, quant_type, block_size)
    assert_same_bits(codes, expected.codes)
    assert_same_bits(absmax, formats.quantize_blocks(weight, expected.quant_format)[1])
    dense = expected.dequantize(torch.bfloat16)
    assert_same_bits(flat.nf4_dequantize(*packed, torch.bfloat16, quant_type, block_size), dense)
    bias = random(N, dtype=torch.bfloat16, requires_grad=True)
    x, plain_x = (random(2, 3, size, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    y = flat.nf4_linear(x, *packed, bias, quant_type, block_size)
    plain_y = F.linear(plain_x, dense, bias)
    assert torch.equal(y, plain_y)
    assert torch.equal(Q.nf4_linear(x, *packed, bias, quant_type, block_size), plain_y)  # the overload is found
    upstream = random(2, 3, N, dtype=torch.bfloat16)
    y.backward(upstream)
    plain_y.backward(upstream)
    assert torch.equal(x.grad, plain_x.grad)


@other_kinds
def test_opcheck_other_kinds(quant_type: str, block_size: int, blocks: int) -> None:
    _, packed = packed_weight(quant_type, block_size, blocks, True)
    size, kind = blocks * block_size, (quant_type, block_size)
    check(Q.nf4_quantize, random_weight((3, size), torch.float32), *kind)
    check(Q.nf4_dequantize, *packed, torch.float32, *kind)
    check(Q.nf4_linear.kind, random(3, size, requires_grad=True), *packed, random(N, requires_grad=True), *kind)
    check(Q.nf4_linear_input_grad, random(3, N, requires_grad=True), *packed, *kind)


def test_the_gradient_of_another_kind_has_a_gradient() -> None:
    weight = random_weight((7, 64), torch.float32)
    packed = formats.quantize(weight, quant_type="fp4", block_size=32, double_quant=False)
    x = random(2, 64, dtype=torch.float64, requires_grad=True)
    arguments = packed.codes, packed.absmax, None, None, None, "fp4", 32
    assert torch.autograd.gradcheck(lambda x: flat.nf4_linear(x, *arguments), x)
    assert torch.autograd.gradgradcheck(lambda x: flat.nf4_linear(x, *arguments), x)


# --- layouts of x ---


def transposed() -> Tensor:
    return random(3, 2, K).transpose(0, 1)


def columns() -> Tensor:
    return random(K, 5).t()


def every_other_column() -> Tensor:
    return random(4, 2 * K)[:, ::2]


def expanded() -> Tensor:
    return random(1, K).expand(6, K)


@pytest.mark.parametrize("make", [transposed, columns, every_other_column, expanded])
def test_strides_of_x_and_of_its_gradient_do_not_matter(make: Callable[[], Tensor]) -> None:
    packed = strided()
    x, straight = make().requires_grad_(), make().contiguous().requires_grad_()
    y, expected = flat.nf4_linear(x, *packed), flat.nf4_linear(straight, *packed)
    torch.testing.assert_close(y, expected, **TOLERANCES[torch.float32])
    assert y.shape == expected.shape
    y.sum().backward()  # an expanded gradient
    expected.backward(torch.ones_like(expected))
    torch.testing.assert_close(x.grad, straight.grad, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (0, 3, K)])
def test_an_empty_batch_works_both_ways(shape: tuple[int, ...]) -> None:
    x, bias = random(*shape, requires_grad=True), random(N, requires_grad=True)
    y = flat.nf4_linear(x, *double(), bias)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    assert x.grad.shape == shape
    assert bias.grad.tolist() == [0] * N


def test_a_weight_without_columns_leaves_the_bias() -> None:
    nothing = torch.zeros(N, 0, dtype=torch.uint8), torch.zeros(N, 0)
    bias = random(N)
    assert torch.equal(flat.nf4_linear(random(2, 0), *nothing, bias=bias), bias.expand(2, N))


def test_a_rank_without_rows_has_a_weight_without_rows() -> None:
    codes, absmax = flat.nf4_quantize(torch.empty(0, K))
    assert (codes.shape, absmax.shape) == ((0, K // 2), (0, K // 64))
    assert flat.nf4_dequantize(codes, absmax).shape == (0, K)


# --- registration ---


def check(op: Callable, *args: object) -> None:
    torch.library.opcheck(op, args)


@every_dtype
def test_opcheck_quantize(dtype: torch.dtype) -> None:
    check(Q.nf4_quantize, random_weight((3, 192), dtype))


@pytest.mark.usefixtures("_backend")
def test_quantizing_a_parameter_keeps_no_graph() -> None:
    codes, absmax = flat.nf4_quantize(random_weight((3, 192), torch.float32).requires_grad_())
    assert not codes.requires_grad
    assert not absmax.requires_grad


@every_dtype
@both_schemas
def test_opcheck_dequantize(packing: Callable[[], Packed], dtype: torch.dtype) -> None:
    check(Q.nf4_dequantize, *packing(), dtype)


@fp32_and_bf16
@both_schemas
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_opcheck_linear(with_bias: bool, packing: Callable[[], Packed], dtype: torch.dtype) -> None:
    bias = random(N, dtype=dtype, requires_grad=True) if with_bias else None
    check(Q.nf4_linear.default, random(2, 3, K, dtype=dtype, requires_grad=True), *packing(), bias)


@pytest.mark.parametrize("make", [transposed, columns, expanded, lambda: random(0, K), lambda: random(K)])
def test_opcheck_linear_on_other_layouts(make: Callable[[], Tensor]) -> None:
    check(Q.nf4_linear.default, make().requires_grad_(), *strided(), random(N))


@fp32_and_bf16
@both_schemas
def test_opcheck_linear_input_grad(packing: Callable[[], Packed], dtype: torch.dtype) -> None:
    check(Q.nf4_linear_input_grad, random(2, 3, N, dtype=dtype), *packing())
    check(Q.nf4_linear_input_grad, random(3, 2, N, dtype=dtype).transpose(0, 1), *packing())
    check(Q.nf4_linear_input_grad, torch.ones((), dtype=dtype).expand(3, N), *packing())


def test_opcheck_linear_input_grad_of_a_gradient_that_requires_grad() -> None:
    check(Q.nf4_linear_input_grad, random(2, 3, N, requires_grad=True), *double())


@fp32_and_bf16
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_linear_compiles_whole_and_gives_the_same(dynamic: bool, dtype: torch.dtype) -> None:
    packed = strided()

    def forward(x: Tensor, bias: Tensor) -> Tensor:
        return flat.nf4_linear(x, *packed, bias).square()

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        results = []
        for function in (forward, compiled):
            x, bias = random(rows, K, dtype=dtype, requires_grad=True), random(N, dtype=dtype, requires_grad=True)
            y = function(x, bias)
            y.sum().backward()
            results.append((y, x.grad, bias.grad))
        for eager, traced in zip(*results, strict=True):
            assert_same_bits(traced.detach(), eager.detach())


class Seen(TorchDispatchMode):
    """Keeps the names of the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_without_gradients_the_dispatcher_is_left_out_only_where_nobody_misses_it() -> None:
    packed, x = double(), random(3, K)
    expected = torch.ops.qsharded.nf4_linear(x, *packed, None)
    assert torch.equal(flat.nf4_linear(x, *packed), expected)
    with Seen() as seen:
        flat.nf4_linear(x, *packed)
    assert "qsharded.nf4_linear.default" in seen.names
    with FakeTensorMode() as fake:
        faked = flat.nf4_linear(fake.from_tensor(x), *(None if t is None else fake.from_tensor(t) for t in packed))
    assert isinstance(faked, FakeTensor)
    assert faked.shape == expected.shape
    on_meta = flat.nf4_linear(x.to("meta"), *(None if t is None else t.to("meta") for t in packed))
    assert (on_meta.is_meta, on_meta.shape) == (True, expected.shape)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_a_trace_without_gradients_has_the_operation() -> None:
    packed, x = double(), random(3, K)
    traced = torch.jit.trace(lambda x: flat.nf4_linear(x, *packed), random(3, K))
    assert "qsharded::nf4_linear" in [node.kind() for node in traced.graph.nodes()]
    assert torch.equal(traced(x), flat.nf4_linear(x, *packed))


@torch.no_grad()
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_without_gradients_has_the_operation(pre_dispatch: bool) -> None:
    packed, x = double(), random(3, K)
    graph = make_fx(lambda x: flat.nf4_linear(x, *packed), pre_dispatch=pre_dispatch)(random(3, K))
    assert torch.equal(graph(x), flat.nf4_linear(x, *packed))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_without_gradients_goes_over_weights_too() -> None:
    codes, absmax, scales, offset = double()
    x, both = random(3, K), torch.stack([codes, codes.flip(0)])
    y = torch.vmap(lambda codes: flat.nf4_linear(x, codes, absmax, scales, offset))(both)
    assert torch.equal(y, torch.stack([flat.nf4_linear(x, codes, absmax, scales, offset) for codes in both]))


class WithoutMemory(Tensor):
    """Wraps a tensor, as DTensor does: its own address is 0."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "WithoutMemory":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", range(4))
def test_a_wrapped_part_of_the_weight_meets_its_own_dispatch_and_no_kernel(wrapped: int) -> None:
    packed = list(double())
    packed[wrapped] = WithoutMemory(packed[wrapped])
    with pytest.raises(NotImplementedError, match=r"qsharded\.nf4_linear"):
        flat.nf4_linear(random(3, K), *packed)


def test_autocast_leaves_the_output_in_the_dtype_of_x() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert flat.nf4_linear(random(3, K), *double()).dtype == torch.float32


def test_backward_inside_autocast_is_that_outside_to_the_last_bit() -> None:
    """PyTorch widens a gradient of another dtype again, when its bits are lost."""
    packed, grad = double(), random(3, N)
    expected = Q.nf4_linear_input_grad(grad, *packed)
    x = random(3, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert Q.nf4_linear_input_grad(grad, *packed).dtype == torch.float32
        flat.nf4_linear(x, *packed).backward(grad)
    assert x.grad is not None
    assert_same_bits(x.grad, expected)


# --- errors: of the operation, and of its fake alike ---

Arguments = dict[str, Tensor | None]
LINEAR_NAMES = ("x", "codes", "absmax", "absmax_scales", "absmax_offset", "bias")


def arguments(**changed: Tensor | None) -> Arguments:
    return dict(zip(LINEAR_NAMES, (random(3, K), *double(), None), strict=True)) | changed


def on(device: str, given: Arguments) -> Arguments:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}


WRONG = {
    "codes of another dtype": (
        {"codes": torch.zeros(N, K // 2, dtype=torch.int8)},
        rf"codes must be uint8 \[N, K/2\] with K a multiple of 64, got torch.int8 \[{N}, {K // 2}\]",
    ),
    "codes that are packed in bf16": (
        {"codes": torch.zeros(N, K // 4, dtype=torch.bfloat16)},
        "codes must be uint8 .* got torch.bfloat16",
    ),
    "codes of one axis": ({"codes": torch.zeros(K // 2, dtype=torch.uint8)}, r"codes must be uint8 \[N, K/2\]"),
    "codes of three axes": ({"codes": torch.zeros(1, N, K // 2, dtype=torch.uint8)}, r"codes must be uint8 \[N, K/2\]"),
    "codes of half a block": (
        {"codes": torch.zeros(N, K // 2 - 16, dtype=torch.uint8)},
        rf"with K a multiple of 64, got torch.uint8 \[{N}, {K // 2 - 16}\]",
    ),
    "absmax with its padding": (
        {"absmax": torch.zeros(N, 10, dtype=torch.uint8)},
        rf"absmax must be \[N, K/64\] = \[{N}, 9\], got torch.uint8 \[{N}, 10\]",
    ),
    "absmax of other rows": ({"absmax": torch.zeros(N - 1, 9, dtype=torch.uint8)}, rf"absmax must be .*\[{N - 1}, 9\]"),
    "flat absmax": ({"absmax": torch.zeros(N * 9, dtype=torch.uint8)}, r"absmax must be \[N, K/64\]"),
    "no offset": ({"absmax_offset": None}, "absmax_scales and absmax_offset come together"),
    "no scales": ({"absmax_scales": None}, "absmax_scales and absmax_offset come together"),
    "codes of absmax without scales": (
        {"absmax_scales": None, "absmax_offset": None},
        "absmax without absmax_scales must be float32, got torch.uint8",
    ),
    "fp32 absmax with scales": ({"absmax": torch.zeros(N, 9)}, "absmax with absmax_scales must be uint8 codes, got"),
    "too few scales": (
        {"absmax_scales": torch.zeros(1)},
        r"absmax_scales must be float32 \[2\], got torch.float32 \[1\]",
    ),
    "scales of two axes": ({"absmax_scales": torch.zeros(2, 1)}, r"absmax_scales must be float32 \[2\]"),
    "bf16 scales": ({"absmax_scales": torch.zeros(2).bfloat16()}, r"absmax_scales must be float32 \[2\], got torch.bf"),
    "two offsets": ({"absmax_offset": torch.zeros(2)}, r"absmax_offset must be one float32, got torch.float32 \[2\]"),
    "a bf16 offset": ({"absmax_offset": torch.zeros(()).bfloat16()}, "absmax_offset must be one float32, got torch.bf"),
}


def packed_part(given: Arguments) -> Arguments:
    return {name: given[name] for name in LINEAR_NAMES[1:5]}


cpu_and_fake = pytest.mark.parametrize("device", ["cpu", "meta"])


@cpu_and_fake
@pytest.mark.parametrize("case", WRONG)
def test_packed_weights_that_do_not_fit_are_refused(case: str, device: str) -> None:
    changed, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        flat.nf4_dequantize(**packed_part(on(device, arguments(**changed))))


@cpu_and_fake
@pytest.mark.parametrize("case", WRONG)
def test_products_refuse_them_too(case: str, device: str) -> None:
    changed, message = WRONG[case]
    given = on(device, arguments(**changed))
    with pytest.raises(ValueError, match=message):
        flat.nf4_linear(**given)
    with pytest.raises(ValueError, match=message):
        Q.nf4_linear_input_grad(random(3, N).to(device), **packed_part(given))


@cpu_and_fake
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (("int4", 64), r"quant_type must be one of \('nf4', 'fp4'\), got 'int4'"),
        (("nf4", 48), r"block_size must be one of \(32, .*, 4096\), got 48"),
        (("nf4", 128), rf"codes must be uint8 \[N, K/2\] with K a multiple of 128, got torch.uint8 \[{N}, {K // 2}\]"),
        (("fp4", 32), rf"absmax must be \[N, K/32\] = \[{N}, 18\], got torch.uint8 \[{N}, 9\]"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(kind: tuple[str, int], message: str, device: str) -> None:
    given = list(on(device, arguments()).values())
    for call in (lambda: flat.nf4_linear(*given, *kind), lambda: Q.nf4_linear_input_grad(given[0], *given[1:5], *kind)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message):
        flat.nf4_dequantize(*given[1:5], torch.float32, *kind)


@cpu_and_fake
@pytest.mark.parametrize("shape", [(3, K + 1), (K, 3), (), (3, 1)])
def test_an_x_whose_last_axis_is_not_K_is_refused(shape: tuple[int, ...], device: str) -> None:
    given = on(device, arguments(x=random(*shape)))
    with pytest.raises(ValueError, match=rf"x's last axis must be {K}, got torch.float32") as raised:
        flat.nf4_linear(**given)
    assert str(list(shape)) in str(raised.value)


@cpu_and_fake
def test_a_gradient_whose_last_axis_is_not_N_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=rf"grad's last axis must be {N}, got torch.float32 \[3, {N + 1}\]"):
        Q.nf4_linear_input_grad(random(3, N + 1).to(device), **packed_part(on(device, arguments())))


@cpu_and_fake
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 65), torch.zeros(64), torch.zeros(1, 3, 64), torch.zeros(3, 64).double(), torch.zeros(3, 64).int()],
    ids=lambda w: f"{w.dtype} {list(w.shape)}",
)
def test_weights_that_cannot_be_quantized_are_refused(weight: Tensor, device: str) -> None:
    with pytest.raises(ValueError, match=r"weight must be a float matrix \[N, K\] with K a multiple of 64, got"):
        flat.nf4_quantize(weight.to(device))


@cpu_and_fake
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype, device: str) -> None:
    given = on(device, arguments(x=random(3, K).to(dtype)))
    with pytest.raises(ValueError, match=f"must be bfloat16, float16, float32 or float64, got {dtype}"):
        flat.nf4_dequantize(**packed_part(given), dtype=dtype)
    with pytest.raises(ValueError, match=f"must be bfloat16, float16, float32 or float64, got {dtype}"):
        flat.nf4_linear(**given)


@cpu_and_fake
@pytest.mark.parametrize(
    "bias",
    [torch.zeros(1), torch.zeros(N + 1), torch.zeros(1, N), torch.zeros(N).bfloat16()],
    ids=lambda b: str(b.shape),
)
def test_a_bias_that_does_not_fit_is_refused(bias: Tensor, device: str) -> None:
    with pytest.raises(ValueError, match=rf"bias must be torch.float32 \[{N}\], got"):
        flat.nf4_linear(**on(device, arguments(bias=bias)))
