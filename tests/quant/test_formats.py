"""The format against bitsandbytes' bytes, its definition, and itself on parts of a weight.

Axes: N = out_features, K = in_features, G = blocks in a row.
"""

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded.quant import blockwise8, formats
from qsharded.quant.codebooks import CODEBOOKS
from tests.golden import nf4_tensors
from tests.kernels.cases import assert_same_bits, every_finite_half, hard_weight, random_weight, rounding_ties

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GOLDEN = nf4_tensors()
all_dtypes = pytest.mark.parametrize("name", DTYPES)

# K = 576 has 9 blocks a row; 1000 rows of them end inside a second-level block.
SHAPES = [(1, 64), (1, 576), (3, 576), (1000, 576), (4, 4096)]


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a faster product that it lacks
    return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def theirs(functional: ModuleType, weight: Tensor, kind: formats.QuantFormat = formats.NF4_64) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_4bit(weight, blocksize=kind.block_size, quant_type=kind.quant_type)
    return codes.view(weight.shape[0], -1), state.absmax.view(weight.shape[0], -1)


def assert_encodes_like(
    expected: tuple[Tensor, Tensor], weight: Tensor, kind: formats.QuantFormat = formats.NF4_64
) -> None:
    codes, absmax = formats.quantize_blocks(weight, kind)
    assert_same_bits(codes, expected[0])
    assert_same_bits(absmax, expected[1])


def codes_of(weight: Tensor) -> Tensor:
    """[N, K], unpacked."""
    codes = formats.quantize(weight, double_quant=False).codes
    return torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)


# --- tables ---


def test_levels_are_bitsandbytes_own() -> None:
    assert_same_bits(formats.codebook(), GOLDEN["codebook"])
    assert_same_bits(formats.codebook(quant_type="fp4"), GOLDEN["codebook.fp4"])


def test_thresholds_are_the_levels_fp32_midpoints() -> None:
    exact = (formats.codebook()[:-1].double() + formats.codebook()[1:].double()) / 2
    assert_same_bits(formats.thresholds(), exact.float())


# --- codes and absmax ---


@all_dtypes
@pytest.mark.parametrize("kind", ["random", "hard"])
def test_codes_and_absmax_are_the_golden_bytes(kind: str, name: str) -> None:
    stored = {part: GOLDEN[f"{kind}.{name}.{part}"] for part in ("weight", "codes", "absmax")}
    assert_encodes_like((stored["codes"], stored["absmax"]), stored["weight"])


@all_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_absmax_equal_bitsandbytes_live(bitsandbytes: ModuleType, shape: tuple[int, int], name: str) -> None:
    weight = random_weight(shape, DTYPES[name])
    assert_encodes_like(theirs(bitsandbytes, weight), weight)


@all_dtypes
def test_hard_weights_equal_bitsandbytes_live(bitsandbytes: ModuleType, name: str) -> None:
    weight = hard_weight(DTYPES[name])
    assert_encodes_like(theirs(bitsandbytes, weight), weight)


@all_dtypes
def test_all_magnitudes_equal_bitsandbytes_live(bitsandbytes: ModuleType, name: str) -> None:
    """Blocks from the smallest subnormal to the largest number."""
    unit = random_weight((400, 64), torch.float32).clamp(-4, 4) / 4
    weight = (unit * 2.0 ** torch.linspace(-151, 127.99, 400).unsqueeze(1)).to(DTYPES[name]).nan_to_num()
    assert_encodes_like(theirs(bitsandbytes, weight), weight)


def test_every_16_bit_number_equals_bitsandbytes_live(bitsandbytes: ModuleType) -> None:
    """In random company, so that each is scaled by many absmax."""
    bf16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for values in (every_finite_half().flatten(), bf16[bf16.isfinite()]):
        mixed = values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))].view(-1, 64)
        for weight in (values.view(-1, 64), mixed):
            assert_encodes_like(theirs(bitsandbytes, weight), weight)


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
def test_other_kinds_equal_bitsandbytes_live(bitsandbytes: ModuleType, quant_type: str, block_size: int) -> None:
    kind = formats.QuantFormat(quant_type, block_size)
    weight = random_weight((3, 2 * block_size), torch.float32)  # bf16 ones would meet FP4's thresholds
    weight[0, :block_size] = 0
    assert_encodes_like(theirs(bitsandbytes, weight, kind), weight, kind)
    packed = formats.quantize(weight, quant_type=quant_type, block_size=block_size, double_quant=False)
    assert (packed.absmax.shape, packed.quant_format) == ((3, 2), kind)
    dequantized = bitsandbytes.dequantize_4bit(
        *bitsandbytes.quantize_4bit(weight, None, None, block_size, False, quant_type)
    )
    assert_same_bits(packed.dequantize(torch.float32), dequantized)
    nearest = formats.codebook(quant_type=quant_type)[codes_by_definition(weight, kind)]
    assert torch.equal(dequantized, nearest * packed.absmax.repeat_interleave(block_size, 1))


def codes_by_definition(weight: Tensor, kind: formats.QuantFormat = formats.NF4_64) -> Tensor:
    """int64 [N, K]: the nearest value in fp64 of the fp32 quotient. Exact but on ties, which random weights lack."""
    blocks = weight.float().unflatten(1, (-1, kind.block_size))
    scaled = blocks * (1 / blocks.abs().amax(-1, keepdim=True).clamp(min=1e-38))
    distance = (scaled.double().unsqueeze(-1) - formats.codebook(quant_type=kind.quant_type).double()).abs()
    return distance.argmin(-1).flatten(1)


def fp4_rows(dtype: torch.dtype) -> Tensor:
    """[N, 64]: thresholds of FP4 and their neighbours, of both signs and at several scales; zeros of both signs."""
    values = torch.tensor(sorted({twelfths / 12 for twelfths in (0, 0.0625, 2, 3, 4, 6, 8, 12)}))
    ties = torch.cat([torch.ones(1), (values[:-1] + values[1:]) / 2, torch.tensor([0.0, -0.0, 1e-7, -1e-7, 1e-30])])
    rows = [ties, torch.nextafter(ties, torch.tensor(2.0)).clamp(max=1), torch.nextafter(ties, torch.tensor(-2.0))]
    both = torch.stack([sign * row * scale for row in rows for sign in (1, -1) for scale in (1, 2.0**-9, 3.7)])
    return torch.nn.functional.pad(both, (0, 64 - both.shape[1])).to(dtype)


@all_dtypes
def test_hard_weights_in_fp4_equal_bitsandbytes_live(bitsandbytes: ModuleType, name: str) -> None:
    kind = formats.QuantFormat("fp4")
    for weight in (fp4_rows(DTYPES[name]), hard_weight(DTYPES[name])):
        assert_encodes_like(theirs(bitsandbytes, weight, kind), weight, kind)


@all_dtypes
def test_every_byte_in_fp4_dequantizes_as_bitsandbytes_dequantizes_it(bitsandbytes: ModuleType, name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    absmax = torch.tensor([0.1, 3.3, -0.02]).unsqueeze(1).expand(-1, 4).contiguous()
    expected = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax.flatten(), 128, "fp4", [3, 512], DTYPES[name])
    assert_same_bits(formats.dequantize_blocks(codes, absmax, DTYPES[name], formats.QuantFormat("fp4", 128)), expected)


def test_golden_bytes_of_other_kinds() -> None:
    for quant_type, block_size in (("fp4", 64), ("fp4", 32), ("nf4", 128)):
        stored = {part: GOLDEN[f"{quant_type}.{block_size}.{part}"] for part in ("weight", "codes", "absmax")}
        kind = formats.QuantFormat(quant_type, block_size)
        assert_encodes_like((stored["codes"], stored["absmax"]), stored["weight"], kind)


@all_dtypes
def test_a_code_is_the_nearest_level(name: str) -> None:
    weight = random_weight((40, 576), DTYPES[name])
    assert torch.equal(codes_of(weight).long(), codes_by_definition(weight))


@all_dtypes
def test_a_zero_block_is_code_7_whatever_its_signs(name: str) -> None:
    weight = torch.zeros(2, 128, dtype=DTYPES[name])
    weight[1] = -0.0
    packed = formats.quantize(weight, double_quant=False)
    assert (packed.codes == 0x77).all()
    assert_same_bits(packed.absmax, torch.zeros(2, 2))
    assert (packed.dequantize(torch.float32) == 0).all()


def test_a_zero_block_does_not_touch_its_neighbours() -> None:
    weight = random_weight((2, 192), torch.float32)
    weight[:, 64:128] = 0
    codes = codes_of(weight)
    assert (codes[:, 64:128] == 7).all()
    assert_same_bits(codes[:, :64].contiguous(), codes_of(weight[:, :64]))
    assert_same_bits(codes[:, 128:].contiguous(), codes_of(weight[:, 128:]))


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**20, 2.0**-120])
def test_a_tie_goes_down_and_its_neighbours_to_their_sides(scale: float) -> None:
    """A block whose absmax is a power of two is scaled exactly, so its thresholds are met exactly."""
    ties = formats.thresholds()
    rows = [ties, torch.nextafter(ties, torch.tensor(2.0)), torch.nextafter(ties, torch.tensor(-2.0))]
    weight = torch.stack([torch.cat([torch.ones(1), row, torch.zeros(48)]) for row in rows]) * scale
    at, above, below = codes_of(weight)[:, 1:16].int()
    assert at.tolist() == list(range(15))
    assert above.tolist() == list(range(1, 16))
    assert below.tolist() == list(range(15))


def test_the_first_weight_is_in_the_high_nibble() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([-1.0, 1.0])
    assert formats.quantize(weight).codes[0, 0] == 0x0F


def test_blocks_under_the_smallest_divisor_are_scaled_by_it() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([1e-39, -1e-39, 1e-45])  # a tenth of 1e-38 lies next to 0.0796 and -0.091, not to 1
    assert codes_of(weight)[0, :3].tolist() == [8, 6, 7]
    assert formats.quantize_blocks(weight)[1].item() == torch.tensor(1e-39).item()


@all_dtypes
def test_the_largest_numbers_keep_their_signs_and_size(name: str) -> None:
    largest = torch.finfo(DTYPES[name]).max
    weight = torch.zeros(1, 64, dtype=DTYPES[name])
    weight[0, :2] = torch.tensor([largest, -largest])
    dequantized = formats.quantize(weight, double_quant=False).dequantize(DTYPES[name])
    assert dequantized[0, :3].tolist() == [largest, -largest, 0]


@all_dtypes
def test_strides_do_not_matter(name: str) -> None:
    weight = random_weight((130, 256), DTYPES[name])
    expected = formats.quantize_blocks(weight)
    assert_encodes_like(expected, weight.t().contiguous().t())
    assert_encodes_like(expected, torch.stack([weight, -weight], dim=-1)[..., 0])
    assert_encodes_like(formats.quantize_blocks(weight[1:2].repeat(3, 1)), weight[1:2].expand(3, -1))


def test_what_is_worked_on_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((11, 576), torch.float32)
    expected = formats.quantize(weight)
    monkeypatch.setattr(formats, "_ELEMENTS_AT_A_TIME", 3 * 576)  # 11 rows are 3 and 3 and 3 and 2
    actual = formats.quantize(weight)
    assert_same_bits(actual.codes, expected.codes)
    assert_same_bits(actual.absmax, expected.absmax)
    assert_same_bits(actual.dequantize(), expected.dequantize())
    monkeypatch.setattr(formats, "_ELEMENTS_AT_A_TIME", 10)  # less than a row: rows one by one
    assert_same_bits(formats.quantize(weight).codes, expected.codes)


def test_thread_count_does_not_matter(threads: Callable[[int], None]) -> None:
    weight = random_weight((600, 2112), torch.float32)  # 33 blocks a row; far above what PyTorch keeps on one thread
    threads(1)
    one = formats.quantize(weight)
    threads(2)
    two = formats.quantize(weight)
    for part in ("codes", "absmax", "absmax_codes", "absmax_scales", "absmax_offset"):
        assert_same_bits(getattr(one, part), getattr(two, part))
    assert_same_bits(one.dequantize(), two.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantizing_a_parameter_keeps_no_graph_and_leaves_it_alone(double_quant: bool) -> None:
    weight = torch.nn.Parameter(random_weight((4, 64), torch.float32))
    before = weight.detach().clone()
    packed = formats.quantize(weight, double_quant=double_quant)
    assert not packed.absmax.requires_grad
    assert_same_bits(weight.detach(), before)


# --- dequantizing ---


@all_dtypes
def test_dequantizing_gives_the_golden_bytes(name: str) -> None:
    dequantized = formats.dequantize_blocks(GOLDEN["dequantize.codes"], GOLDEN["dequantize.absmax"], DTYPES[name])
    assert_same_bits(dequantized, GOLDEN[f"dequantize.{name}"])


@all_dtypes
def test_every_byte_dequantizes_to_its_two_values_at_every_scale(name: str) -> None:
    scales = torch.tensor([0.0, 1.0, 0.1, 3.3, 1e-40, 7e4, 3.4e38, -0.02])
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    dequantized = formats.dequantize_blocks(codes, scales.unsqueeze(1).expand(-1, 8), DTYPES[name])
    assert dequantized.shape == (len(scales), 512)
    for row, scale in zip(dequantized, scales, strict=True):
        values = [CODEBOOKS["nf4"][code] for byte in range(256) for code in (byte >> 4, byte & 15)]
        assert_same_bits(row, (torch.tensor(values) * scale).to(DTYPES[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantizing_rounds_ties_to_even(dtype: torch.dtype) -> None:
    encoded, expected = rounding_ties(dtype)
    assert_same_bits(formats.dequantize_blocks(encoded.codes, encoded.absmax, dtype), expected)


@all_dtypes
def test_dequantizing_and_encoding_again_gives_the_same_bytes(name: str) -> None:
    packed = formats.quantize(random_weight((20, 576), DTYPES[name]), double_quant=False)
    assert_encodes_like((packed.codes, packed.absmax), packed.dequantize(torch.float32))


def test_dequantize_is_bf16_unless_told() -> None:
    packed = formats.quantize(random_weight((3, 576), torch.float32))
    assert_same_bits(packed.dequantize(), packed.dequantize(torch.float32).bfloat16())
    assert_same_bits(packed.dequantize(torch.float16), packed.dequantize(torch.float32).half())


def test_dequantize_uses_the_dequantized_absmax() -> None:
    """That of training and of every kernel, which know only the 8-bit codes."""
    weight = random_weight((40, 576), torch.float32)
    packed = formats.quantize(weight)
    assert packed.absmax_codes is not None
    assert packed.absmax_scales is not None
    assert packed.absmax_offset is not None
    dequantized = formats.dequantize_absmax(packed.absmax_codes, packed.absmax_scales, packed.absmax_offset)
    assert_same_bits(packed.absmax, dequantized)
    assert not torch.equal(packed.absmax, formats.quantize_blocks(weight)[1])
    assert_same_bits(
        packed.dequantize(torch.float32), formats.dequantize_blocks(packed.codes, dequantized, torch.float32)
    )


def test_without_double_quantization_absmax_is_exact_and_has_no_codes() -> None:
    weight = random_weight((3, 576), torch.bfloat16)
    packed = formats.quantize(weight, double_quant=False)
    assert packed.absmax_codes is packed.absmax_scales is packed.absmax_offset is None
    assert_same_bits(packed.absmax, weight.float().unflatten(1, (9, 64)).abs().amax(-1))


def test_the_default_device_does_not_reach_the_tables() -> None:
    """They are made at first use, which may be while a model is built on the meta device or a GPU, and stay."""
    tables = (formats.codebook, formats.thresholds, formats._codebook_pairs, formats.ascending_codes)
    for table in tables:
        table.cache_clear()
    with torch.device("meta"):
        dequantized = formats.dequantize_blocks(GOLDEN["dequantize.codes"], GOLDEN["dequantize.absmax"], torch.float32)
        codes, _ = formats.quantize_blocks(GOLDEN["random.fp32.weight"])
    assert_same_bits(dequantized, GOLDEN["dequantize.fp32"])
    assert_same_bits(codes, GOLDEN["random.fp32.codes"])


# --- double quantization ---


def random_absmax(rows: int, blocks: int) -> Tensor:
    return formats.quantize_blocks(random_weight((rows, 64 * blocks), torch.float32))[1]


@pytest.mark.parametrize(("rows", "blocks", "second_level"), [(1, 1, 1), (1, 256, 1), (257, 1, 2), (57, 9, 3)])
def test_double_quantization_follows_its_definition(rows: int, blocks: int, second_level: int) -> None:
    absmax = random_absmax(rows, blocks)
    codes, scales, offset = formats.double_quantize(absmax)
    assert (codes.shape, scales.shape, offset.shape) == (absmax.shape, (second_level,), ())
    assert formats.second_level_blocks(rows, blocks) == second_level
    runs = (absmax - offset).flatten().split(256)
    assert_same_bits(scales, torch.stack([run.abs().max() for run in runs]))
    expected = torch.cat([blockwise8.nearest_codes(run, run.abs().max()) for run in runs])
    assert_same_bits(codes.flatten(), expected)
    entries = blockwise8.dynamic_map()[codes.flatten().long()]
    dequantized = entries * scales.repeat_interleave(256)[: absmax.numel()] + offset
    assert_same_bits(formats.dequantize_absmax(codes, scales, offset), dequantized.view(rows, blocks))


def test_the_offset_is_the_mean_summed_in_fp64_along_rows_and_then_down() -> None:
    """Magnitudes so far apart that another order of summation gives another sum."""
    exponents = torch.rand(300, 9, generator=torch.Generator().manual_seed(0)) * 120
    absmax = 2.0**exponents
    row_sums = [sum_from_left(row) for row in absmax.tolist()]
    assert formats.absmax_row_sums(absmax).tolist() == row_sums
    offset = formats.absmax_offset(formats.absmax_row_sums(absmax), 9)
    assert_same_bits(offset, torch.tensor(sum_from_left(row_sums) / absmax.numel()))
    assert row_sums != absmax.double().sum(1).tolist()


def sum_from_left(values: list[float]) -> float:
    """Python 3.12's ``sum`` compensates for rounding."""
    total = 0.0
    for value in values:
        total += value
    return total


@pytest.mark.parametrize(
    ("row_sums", "total"),
    [
        ([2.0**54, *[1.0] * 4096, -(2.0**54)], 0),  # each 1 is lost in what comes before it; in pairs they would count
        ([1.0, 1.0, 1.0, 2.0**54, -(2.0**54)], 4),  # 3 rounds up to 2**54's next; from the other end it would be 3
    ],
)
def test_row_sums_are_added_from_first_to_last(row_sums: list[float], total: int) -> None:
    """Of signs that no absmax has, for only then fp32 shows the order in which fp64 was summed."""
    offset = formats.absmax_offset(torch.tensor(row_sums, dtype=torch.float64), 2)
    assert offset.item() == torch.tensor(total / (len(row_sums) * 2)).item()


@pytest.mark.parametrize("cuts", [[], [37], [9, 28], [1, 2, 36], [10, 10, 30, 50], [49], [0]])
def test_bytes_do_not_depend_on_how_rows_are_cut(cuts: list[int]) -> None:
    """1 to 5 runs of 50 rows, one of them empty in some; 9 blocks a row put second-level blocks across the cuts."""
    weight = random_weight((50, 576), torch.bfloat16)
    expected_codes, expected_absmax = formats.quantize_blocks(weight)
    expected = formats.double_quantize(expected_absmax)
    firsts = [0, *cuts]
    runs = [formats.quantize_blocks(rows) for rows in weight.tensor_split(cuts)]
    assert_same_bits(torch.cat([codes for codes, _ in runs]), expected_codes)

    offset = formats.absmax_offset(torch.cat([formats.absmax_row_sums(absmax) for _, absmax in runs]), 9)
    partial = [
        formats.absmax_scales(absmax, offset, first_row=first, rows=50)
        for first, (_, absmax) in zip(firsts, runs, strict=True)
    ]
    scales = torch.stack(partial).amax(0)
    parts = [
        formats.encode_absmax(absmax, scales, offset, first_row=first)
        for first, (_, absmax) in zip(firsts, runs, strict=True)
    ]
    for actual, wanted in zip((torch.cat(parts), scales, offset), expected, strict=True):
        assert_same_bits(actual, wanted)


def test_scales_of_rows_elsewhere_are_zero() -> None:
    absmax = random_absmax(10, 9)
    scales = formats.absmax_scales(absmax, torch.tensor(0.0), first_row=40, rows=100)
    assert (scales > 0).tolist() == [False, True, False, False]  # values 360 to 449 lie in the block from 256 on


def test_a_zero_second_level_block_is_code_127_and_dequantizes_to_the_offset() -> None:
    weight = random_weight((7, 576), torch.float32).clamp(-1, 1)
    weight[:, ::64] = 1.7  # every block's absmax, and so their mean
    packed = formats.quantize(weight)
    assert (packed.absmax_codes == 127).all()
    assert packed.absmax_scales.tolist() == [0]
    assert_same_bits(packed.absmax, formats.quantize_blocks(weight)[1])


def test_a_zero_weight_stays_zero_through_double_quantization() -> None:
    packed = formats.quantize(torch.zeros(3, 128))
    assert (packed.absmax_codes == 127).all()
    assert packed.absmax_offset.item() == 0
    assert (packed.dequantize(torch.float32) == 0).all()


def test_a_zero_second_level_block_among_others_is_code_127() -> None:
    absmax = torch.ones(3, 256)
    absmax[0], absmax[2] = 0.5, 1.5
    codes, scales, offset = formats.double_quantize(absmax)
    assert offset.item() == 1
    assert scales.tolist() == [0.5, 0, 0.5]
    assert [row.unique().tolist() for row in codes] == [[0], [127], [255]]


# bitsandbytes looks codes up in 65,536 bins over [-1, 1]. The map's entries lie closer than a bin only where they are
# smaller than this; there its code may be more than one step off.
FINE_ENTRIES = 2.0**-14


def assert_codes_agree(absmax: Tensor, codes: Tensor, scales: Tensor, offset: Tensor) -> None:
    """What DESIGN promises of ours against bitsandbytes' ``codes``, flat, under its offset and scales."""
    ours = formats.encode_absmax(absmax, scales, offset, first_row=0).flatten().long()
    steps = (ours - codes.long()).abs()
    assert (steps == 0).double().mean() >= 0.995
    divisors = scales.clamp(min=1e-38).repeat_interleave(256)[: absmax.numel()]
    scaled = (absmax - offset).flatten() * (1 / divisors)
    assert steps[scaled.abs() >= FINE_ENTRIES].max() <= 1
    distance = (scaled.double().unsqueeze(1) - blockwise8.dynamic_map().double()).abs()
    nearest = distance.argmin(1)
    on_a_threshold = torch.isin(scaled, blockwise8.thresholds())
    assert torch.equal(ours[~on_a_threshold], nearest[~on_a_threshold])


def test_double_quantization_agrees_with_golden_codes() -> None:
    absmax, theirs = GOLDEN["double.absmax"], {k: GOLDEN[f"double.{k}"] for k in ("codes", "scales", "offset")}
    _, _, offset = formats.double_quantize(absmax)
    assert abs(offset.item() - theirs["offset"].item()) <= 1e-6 * theirs["offset"].item()
    scales = formats.absmax_scales(absmax, theirs["offset"], first_row=0, rows=absmax.shape[0])
    assert_same_bits(scales, theirs["scales"])
    assert_codes_agree(absmax, theirs["codes"].flatten(), **{k: theirs[k] for k in ("scales", "offset")})


@pytest.mark.parametrize(("shape", "scale"), [((500, 2304), 0.02), ((777, 576), 1.0), ((64, 4096), 30.0)])
def test_double_quantization_agrees_with_bitsandbytes_live(
    bitsandbytes: ModuleType, shape: tuple[int, int], scale: float
) -> None:
    weight = random_weight(shape, torch.float32) * scale
    _, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = formats.quantize(weight)
    assert abs(packed.absmax_offset.item() - state.offset.item()) <= 1e-6 * state.offset.item()
    _, absmax = formats.quantize_blocks(weight)
    scales = formats.absmax_scales(absmax, state.offset, first_row=0, rows=shape[0])
    assert_same_bits(scales, state.state2.absmax)
    assert_codes_agree(absmax, state.absmax.flatten(), scales, state.offset)


# --- errors ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@all_dtypes
def test_a_weight_that_is_not_finite_is_refused(name: str, value: float) -> None:
    weight = torch.ones(3, 64, dtype=DTYPES[name])
    weight[2, 63] = value
    with pytest.raises(ValueError, match=r"^weight holds NaN or infinity"):
        formats.quantize(weight)


@pytest.mark.parametrize("shape", [(64,), (2, 2, 64), (0, 64), (3, 0), ()])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight must be a non-empty matrix \[N, K\], got shape \(") as raised:
        formats.quantize(torch.ones(shape))
    assert str(tuple(shape)) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"must be bfloat16, float16 or float32 to be quantized, got {dtype}"):
        formats.quantize(torch.ones(2, 64).to(dtype))


@pytest.mark.parametrize("K", [1, 63, 65, 100, 32])
def test_a_K_that_is_no_multiple_of_the_block_is_refused(K: int) -> None:
    with pytest.raises(ValueError, match=f"in_features must be a multiple of 64, got {K}"):
        formats.quantize(torch.ones(2, K))


def test_a_K_that_is_a_multiple_of_64_alone_is_refused_for_larger_blocks() -> None:
    with pytest.raises(ValueError, match="in_features must be a multiple of 128, got 192"):
        formats.quantize(torch.ones(2, 192), block_size=128)


@pytest.mark.parametrize("block_size", [0, -64, 16, 65, 8192])
def test_block_sizes_that_the_format_lacks_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"block_size must be one of \(32, .*, 4096\), got {block_size}$"):
        formats.quantize(torch.ones(2, 8192), block_size=block_size)


@pytest.mark.parametrize("said", [("nf4", 64.0), ("nf4", [64]), ("nf4", "64"), (["fp4"], 64), (None, 64)])
def test_kinds_that_json_spells_otherwise_are_refused(said: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*, got"):
        formats.QuantFormat(*said)


def test_levels_that_the_format_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quant_type must be one of \('nf4', 'fp4'\), got 'int4'$"):
        formats.quantize(torch.ones(2, 64), quant_type="int4")


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 63), torch.ones(64), torch.ones(2, 64).double(), torch.full((2, 64), float("nan"))]
)
def test_errors_name_the_weight(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.mlp\.up_proj\.weight\b"):
        formats.check_weight(weight, name="model.layers.3.mlp.up_proj.weight")
