"""Experts below each other in one parameter: each one's bytes are those of its matrix alone, on any number of ranks."""

import itertools

import pytest
import torch
from torch import Tensor

from qsharded.quant import formats
from qsharded.quant.convert import quantize_
from qsharded.quant.experts import ExpertLinears, PackedExperts
from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import SharedRows, double_quantize_experts

E, N, K = 5, 24, 192  # 72 absmax an expert: a second-level block that is not full


def random_experts(bias: bool = False) -> ExpertLinears:
    torch.manual_seed(0)
    experts = ExpertLinears(E, K, N, bias)
    with torch.no_grad():
        experts.weight.mul_(torch.arange(1, E + 1)[:, None, None])  # scales and offsets differ between experts
    return experts


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_has_the_bytes_of_its_matrix_alone(quant_type: str, double_quant: bool) -> None:
    experts = random_experts()
    packed = PackedExperts.from_experts(experts, quant_format=QuantFormat(quant_type), double_quant=double_quant)
    for e, weight_NK in enumerate(experts.weight.detach()):
        alone = formats.quantize(weight_NK, quant_type=quant_type, double_quant=double_quant)
        one = packed.packed().expert(e)
        one.check()
        assert one.codes.equal(alone.codes)
        assert one.decoded_absmax().equal(alone.absmax)
        if double_quant:
            assert one.absmax.equal(alone.absmax_codes)
            assert one.absmax_scales.equal(alone.absmax_scales)
            assert one.absmax_offset.equal(alone.absmax_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [2, 3], [4], [0, 3, 4]])
def test_any_choice_is_decoded_to_the_bits_of_each_alone(
    chosen: list[int], double_quant: bool, dtype: torch.dtype
) -> None:
    experts = random_experts()
    packed = PackedExperts.from_experts(experts, quant_format=QuantFormat(), double_quant=double_quant)
    decoded_nNK = packed.packed().decoded(chosen, dtype)
    for e, weight_NK in zip(chosen, decoded_nNK, strict=True):
        alone = formats.quantize(experts.weight.detach()[e], double_quant=double_quant)
        assert weight_NK.equal(alone.dequantize(dtype))


@pytest.mark.parametrize("edges", [[0, E * N], [0, 60, E * N], [0, 10, 20, 24, 119, E * N], [0, E * N, E * N]])
def test_ranks_encode_the_absmax_that_one_process_does(edges: list[int]) -> None:
    torch.manual_seed(1)
    absmax_RG = torch.rand(E * N, K // 64) * torch.arange(1, E + 1).repeat_interleave(N)[:, None]
    alone = [formats.double_quantize(part) for part in absmax_RG.unflatten(0, (E, N))]
    codes = _on_ranks(absmax_RG, edges)
    for made in codes:
        assert made.scales.equal(torch.stack([scales for _, scales, _ in alone]))
        assert made.offset.equal(torch.stack([offset for *_, offset in alone]))
    assert torch.cat([made.codes for made in codes]).equal(torch.cat([of_one for of_one, *_ in alone]))


def _on_ranks(absmax_RG: Tensor, edges: list[int]) -> list:
    """Each rank's, one after the other: a collective's result is what an earlier round of all of them put in."""
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for _ in range(3):  # the second collective sees what the first settled, the result what both did
        before, seen = seen, {0: [], 1: []}
        made = []
        for start, stop in itertools.pairwise(edges):
            calls = iter((0, 1))

            def all_reduce(tensor: Tensor, op: object, calls=calls, before=before, seen=seen) -> None:
                call = next(calls)
                seen[call].append(tensor.clone())
                for other in before[call]:
                    tensor.copy_(torch.maximum(tensor, other))  # disjoint parts that are not negative: SUM is MAX

            made.append(
                double_quantize_experts(absmax_RG[start:stop], E, SharedRows(start, len(absmax_RG), all_reduce))
            )
    return made


def test_quantize_packs_experts_and_keeps_their_bias() -> None:
    model = torch.nn.ModuleDict({"up_proj": random_experts(bias=True)})
    bias = model["up_proj"].bias.detach().clone().normal_()
    model["up_proj"].bias.data.copy_(bias)
    quantize_(model)
    packed = model["up_proj"]
    assert isinstance(packed, PackedExperts)
    assert packed.bias.equal(bias)
    assert not packed.bias.requires_grad
    with pytest.raises(TypeError, match="PackedExperts cannot be cast"):
        packed.float()


def test_torn_rows_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="in_features must be a multiple of 64, got 100"):
        PackedExperts(2, 100, 8)


def test_an_expert_that_is_not_finite_is_named() -> None:
    experts = random_experts()
    experts.weight.data[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"up_proj\[3\] holds NaN"):
        PackedExperts.from_experts(experts, "up_proj", quant_format=QuantFormat())
