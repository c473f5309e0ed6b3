from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qsharded.quant import blockwise8
from tests.golden import nf4_tensors
from tests.kernels.cases import assert_same_bits

GOLDEN = nf4_tensors()
both_maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
SCALES = [1.0, 3.7, 1e-6, 2.0**100, 1e-30]


@both_maps
def test_the_map_is_bitsandbytes_own(signed: bool) -> None:
    assert_same_bits(blockwise8.dynamic_map(signed), GOLDEN["map.signed" if signed else "map.unsigned"])


@both_maps
def test_the_map_ascends_and_ends_at_one(signed: bool) -> None:
    entries = blockwise8.dynamic_map(signed)
    assert (entries.diff() > 0).all()
    assert entries[-1] == 1
    assert entries[blockwise8.ZERO_CODE if signed else 0] == 0


@both_maps
def test_thresholds_are_fp32_midpoints(signed: bool) -> None:
    entries = blockwise8.dynamic_map(signed).double()
    assert_same_bits(blockwise8.thresholds(signed), ((entries[:-1] + entries[1:]) / 2).float())


def values(signed: bool) -> Tensor:
    """All magnitudes down to below the map's smallest, evenly spread ones, and those about each threshold."""
    thresholds = blockwise8.thresholds(signed)
    sides = [torch.nextafter(thresholds, torch.tensor(end)) for end in (-2.0, 2.0)]
    positive = torch.cat([torch.logspace(-9, 0, 20000), torch.linspace(0, 1, 20000)])
    return torch.cat([positive, -positive, *sides] if signed else [positive, *sides])


@both_maps
def test_a_code_is_the_nearest_entry(signed: bool) -> None:
    scaled = values(signed)
    scaled = scaled[~torch.isin(scaled, blockwise8.thresholds(signed))]
    codes = blockwise8.nearest_codes(scaled, torch.ones(()), signed)
    distance = (scaled.double().unsqueeze(1) - blockwise8.dynamic_map(signed).double()).abs()
    assert torch.equal(codes.long(), distance.argmin(1))


@both_maps
def test_a_tie_goes_down(signed: bool) -> None:
    codes = blockwise8.nearest_codes(blockwise8.thresholds(signed), torch.ones(()), signed)
    assert codes.tolist() == list(range(255))


@both_maps
@pytest.mark.parametrize("scale", SCALES)
def test_every_code_dequantizes_to_its_entry_times_the_scale_and_back(signed: bool, scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    dequantized = blockwise8.dequantize(codes, torch.tensor(scale), signed)
    assert_same_bits(dequantized, blockwise8.dynamic_map(signed) * torch.tensor(scale))
    assert_same_bits(blockwise8.nearest_codes(dequantized, torch.tensor(scale), signed), codes)


@pytest.mark.parametrize("scale", [3.0, 0.7, 1.1e-3])
def test_a_value_is_multiplied_by_the_reciprocal_of_its_scale(scale: float) -> None:
    """Not divided by it, which rounds once and puts some values on the other side of a threshold."""
    thresholds = blockwise8.thresholds()
    values, scales = thresholds * scale, torch.tensor(scale)
    sides = torch.cat([values, *(torch.nextafter(values, torch.tensor(end)) for end in (-9.0, 9.0))])
    by_reciprocal, by_division = (torch.searchsorted(thresholds, x) for x in (sides * (1 / scales), sides / scales))
    assert not torch.equal(by_reciprocal, by_division)
    assert torch.equal(blockwise8.nearest_codes(sides, scales).long(), by_reciprocal)


def test_scales_broadcast_over_values() -> None:
    rows = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scales = torch.tensor([[0.5], [1.0], [2.0]])
    codes = blockwise8.nearest_codes(rows * scales, scales)
    assert_same_bits(codes, blockwise8.nearest_codes(rows, torch.ones(())))
    assert_same_bits(blockwise8.dequantize(codes, scales), blockwise8.dynamic_map()[codes.long()] * scales)


def test_a_value_beyond_its_scale_takes_the_end_of_the_map() -> None:
    codes = blockwise8.nearest_codes(torch.tensor([-5.0, 5.0]), torch.ones(()))
    assert codes.tolist() == [0, 255]


@both_maps
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_block_is_the_code_of_zero(signed: bool, zero: float) -> None:
    codes = blockwise8.nearest_codes(torch.full((4,), zero), torch.zeros(()), signed)
    assert (codes == (blockwise8.ZERO_CODE if signed else 0)).all()
    assert (blockwise8.dequantize(codes, torch.zeros(()), signed) == 0).all()


def test_a_block_under_the_smallest_scale_is_scaled_by_it() -> None:
    values = torch.tensor([1e-39, -1e-39])  # a tenth of 1e-38
    expected = blockwise8.nearest_codes(torch.tensor([0.1, -0.1]), torch.ones(()))
    assert_same_bits(blockwise8.nearest_codes(values, torch.tensor(1e-39)), expected)


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    tables = (blockwise8.dynamic_map, blockwise8.thresholds)
    for table in tables:
        table.cache_clear()
    yield
    for table in tables:
        table.cache_clear()


@pytest.mark.usefixtures("fresh_tables")
def test_the_default_dtype_does_not_reach_the_map() -> None:
    """It is made at first use, which may be while a model is built in another dtype, and stays."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        entries = blockwise8.dynamic_map()
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(entries, GOLDEN["map.signed"])


@pytest.mark.usefixtures("fresh_tables")
def test_the_default_device_does_not_reach_the_map() -> None:
    """A model is built under ``torch.device("meta")``, or on a GPU, whose linspace may round in another way."""
    with torch.device("meta"):
        entries = blockwise8.dynamic_map()
    assert_same_bits(entries, GOLDEN["map.signed"])
