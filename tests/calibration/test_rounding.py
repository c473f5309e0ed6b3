"""Searched scales and compensated codes, against their definitions and against rounding to nearest."""

import itertools

import pytest
import torch

from qsharded.calibration.column_loop import round_columns_by_reference
from qsharded.calibration.compensated import ColumnOrder, compensated, searched
from qsharded.calibration.scale_frame import alone
from qsharded.calibration.scale_search import search_scales
from qsharded.calibration.second_moments import DampedMoments, SecondMoments
from qsharded.quant import formats
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.pack_weight import SharedRows, pack_weight
from qsharded.quant.packed_weight import PackedWeight
from tests.calibration.cases import inputs, moments, output_error, weight

N, K = 96, 320  # five blocks a row, second-level blocks that straddle rows


def rounded(how: str, quant_format: QuantFormat = NF4_64, rows: SharedRows | None = None) -> PackedWeight:
    own = weight(N, K) if rows is None else weight(N, K)[rows.start : rows.start + N // 2]
    damped = moments(inputs(2048, K)).damped("w")
    if how == "nearest":
        return pack_weight(own, quant_format)
    if how == "search":
        return searched(own, damped.importance_K, quant_format, rows or alone(N))
    order = ColumnOrder.of(damped, quant_format.block_size)
    return compensated(own, damped.importance_K, order, quant_format, rows or alone(N))


@pytest.mark.parametrize("quant_format", [NF4_64, QuantFormat("fp4", 32)], ids=str)
def test_each_method_is_closer_on_inputs_that_it_has_not_seen(quant_format: QuantFormat) -> None:
    x = inputs(2048, K, seed=7)
    errors = [output_error(rounded(how, quant_format), weight(N, K), x) for how in ("nearest", "search", "compensated")]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_the_tensors_are_as_large_as_those_of_rounding_to_nearest() -> None:
    for one, other in zip(rounded("compensated").tensors, rounded("nearest").tensors, strict=True):
        assert one is not None
        assert other is not None
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    rounded("compensated").check()


def test_half_of_the_scales_are_negative() -> None:
    share = (rounded("compensated").decoded_absmax() < 0).double().mean().item()
    assert 0.35 < share < 0.65


def test_a_searched_scale_is_the_best_of_all_candidates() -> None:
    blocks = weight(40, 64).float()
    importance = inputs(64, 64).square().mean(0)
    found = search_scales(blocks, importance[None], NF4_64)
    candidates = [sign * (0.82 + 0.02 * step) for sign, step in itertools.product((1, -1), range(13))]
    book = formats.codebook()
    for block, scale in zip(blocks, found, strict=True):
        errors = []
        for factor in (*candidates, scale / block.abs().max()):
            levels = book * factor * block.abs().max()
            errors.append(((block[:, None] - levels).abs().min(1).values.square() * importance).sum())
        assert errors[-1] <= min(errors) * (1 + 1e-5)


def test_columns_are_rounded_as_the_inverse_says() -> None:
    """Against the definition without factors: after each column the others move to their best, given all so far."""
    H = moments(inputs(512, 64)).damped("w").H_KK.double()
    block = weight(8, 64).float()
    scales = block.abs().amax(1) * torch.tensor([1.0, -1.0]).repeat(4)
    order = torch.arange(64)
    codes, _ = round_columns_by_reference(block, scales, DampedMoments(H.float()).inverse_factor(order), NF4_64)
    left, book = block.double(), formats.codebook().double()
    for j in range(64):
        levels = book * scales.double()[:, None]
        expected = (left[:, j, None] - levels).abs().argmin(1)
        agree = expected == codes[:, j]
        assert agree.double().mean() > 0.9  # fp32 and fp64 may fall to different sides of a midpoint
        decoded = levels.gather(1, codes[:, j, None].long())[:, 0]
        rest = slice(j + 1, None)
        # least squares over the rest: dw_rest = -inv(H_rest) H_rest,j dw_j
        moved = torch.linalg.solve(H[rest, rest], H[rest, j]) if j < 63 else H[rest, j]
        left[:, rest] += (left[:, j] - decoded)[:, None] * moved
    assert not torch.equal(codes, formats.nearest_codes((block / scales[:, None]).clamp(-1, 1)))


@pytest.mark.parametrize("how", ["search", "compensated"])
def test_ranks_that_share_the_rows_write_the_same_bytes(how: str) -> None:
    whole = rounded(how)
    shared: list[torch.Tensor] = []

    def first_pass(tensor: torch.Tensor, op: object) -> None:
        shared.append(tensor.clone())

    halves = N // 2
    for start in (0, halves):  # what each rank gives to the others
        rounded(how, rows=SharedRows(start, N, first_pass))
    sums = shared[0] + shared[2]
    # maxima depend on the agreed offset, so they are taken from the whole weight's
    maxima = whole.absmax_scales
    for start in (0, halves):
        agreed = iter((sums, maxima))
        part = rounded(how, rows=SharedRows(start, N, lambda tensor, op, agreed=agreed: tensor.copy_(next(agreed))))
        assert torch.equal(part.codes, whole.codes[start : start + halves])
        assert torch.equal(part.absmax, whole.absmax[start : start + halves])
        assert whole.absmax_offset is not None
        assert torch.equal(part.absmax_offset, whole.absmax_offset)


def test_blocks_of_zeros_and_columns_without_inputs() -> None:
    own = weight(16, 128)
    own[:, 64:] = 0
    x = inputs(512, 128)
    x[:, ::3] = 0
    damped = moments(x).damped("w")
    for packed in (
        searched(own, damped.importance_K, NF4_64, alone(16)),
        compensated(own, damped.importance_K, ColumnOrder.of(damped, 64), NF4_64, alone(16)),
    ):
        values = formats.dequantize_blocks(packed.codes, packed.decoded_absmax(), torch.float32)
        assert values.isfinite().all()
        assert output_error(packed, own, x) < 0.01


def test_without_inputs_every_column_counts_alike() -> None:
    assert torch.equal(SecondMoments(64, torch.device("cpu")).damped("w").importance_K, torch.ones(64))


def test_inputs_that_are_not_finite_are_refused_by_the_weights_name() -> None:
    x = inputs(4, 64)
    x[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"the inputs of layer\.weight are not finite"):
        moments(x).damped("layer.weight")
