"""A layer's experts rounded for the tokens that its router gave to each.

One expert is rounded at a time, or one on each rank, so that of E matrices of second moments a few are in memory: 128
take 2 GiB in Qwen3-30B-A3B and 8.6 in GLM-4.5-Air. Gate and up share theirs; those of a down projection are of what
its expert makes of its tokens with gate and up rounded already.

Axes: n tokens of an expert, E experts, D hidden size, J intermediate size, N = out_features, K = in_features.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.calibration.compensated import InputsRounding
from qsharded.calibration.expert_inputs import ExpertInputs
from qsharded.calibration.method import Calibration
from qsharded.calibration.scale_frame import alone
from qsharded.calibration.second_moments import SecondMoments
from qsharded.checkpoint.calibration_record import ALL_EXPERTS, BY_SEARCH
from qsharded.quant import formats, ops
from qsharded.quant.experts import ExpertLinears, PackedExpertWeights
from qsharded.quant.gated_experts import GatedExperts
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils import collectives, heartbeat

GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
"""The projections that share their inputs."""
_FEWEST = 8  # a down projection's tokens, of its columns: below an eighth they tell no more than a search has


class ExpertRounding:
    """Rounds the experts of one mixture in place, and keeps their packed matrices. All ranks do it together.

    Args:
        experts: in 16 or 32 bits.
        name: what a checkpoint calls them.
        inputs: what they get on this rank's calibration rows.

    Attributes:
        counts: how many experts there are, and for how many scales alone were chosen, as the checkpoint's record says.
    """

    def __init__(self, experts: GatedExperts, name: str, inputs: ExpertInputs, how: Calibration) -> None:
        self._experts, self._name, self._inputs, self._how = experts, name, inputs, how
        self._packed: dict[str, dict[int, PackedWeight]] = {}
        self.counts = Counter({ALL_EXPERTS: experts.gate_proj.experts})

    @torch.no_grad()
    def run(self) -> None:
        """Round all of them.

        Raises:
            ValueError: a weight or an input that is not finite.
        """
        self._demand_finite()
        gate, ranks = self._experts.gate_proj, collectives.size(self._how.group)
        device = gate.weight.device
        of_all = self._agreed(self._inputs.of_all(device), gate.in_features, device)
        for first in range(0, gate.experts, ranks):
            heartbeat.beat("calibrating experts")
            batch = range(first, min(first + ranks, gate.experts))
            xs = [self._inputs.of_expert(e, device) for e in batch]
            self._round(GATE_UP, batch, xs, of_all)
            self._round(DOWN, batch, [self._hidden(e, x_nD) for e, x_nD in zip(batch, xs, strict=True)], None)

    def weights(self) -> dict[str, PackedExpertWeights]:
        """What is packed, by the names of the weights in a checkpoint; on the main rank alone."""
        return {
            f"{self._name}.{part}.weight": PackedExpertWeights.of([packed[e] for e in sorted(packed)])
            for part, packed in self._packed.items()
        }

    def _round(
        self, parts: Sequence[str], batch: Sequence[int], inputs: Sequence[Tensor], of_all: SecondMoments | None
    ) -> None:
        """Projections that see the same ``inputs``, of a batch of experts, of which each rank rounds one."""
        how, like = self._how, self._part(parts[0])
        if like.in_features % how.quant_format.block_size:
            return
        own = min(collectives.rank(how.group), len(batch) - 1)  # ranks too many do the last one over
        for number, x_nK in enumerate(inputs):
            moments = self._agreed([x_nK], like.in_features, x_nK.device)
            moments.demand_finite(self._weight_name(parts[0], batch[number]))  # on all ranks, or some would wait
            by_search = widened(moments, of_all) or how.method == "search"
            self.counts[" and ".join(part.removesuffix("_proj") for part in parts) + BY_SEARCH] += by_search
            if number == own:
                chosen = moments, by_search
        moments, by_search = chosen
        damped = moments.damped(self._weight_name(parts[0], batch[own]))
        rounding = InputsRounding.of(damped, how.quant_format, by_search=by_search)
        for part in parts:
            weight_NK = self._part(part).weight[batch[own]]
            self._hold(part, batch, rounding.packed(weight_NK, alone(like.out_features)))

    def _agreed(self, inputs: Iterable[Tensor], K: int, device: torch.device) -> SecondMoments:
        """Of inputs [n, K] on all ranks."""
        moments = SecondMoments(K, device)
        for x_nK in inputs:
            if len(x_nK):
                moments.add(x_nK)
        moments.agree(self._how.group)
        return moments

    def _hold(self, part: str, batch: Sequence[int], own: PackedWeight) -> None:
        """Have every rank's expert compute as it will be packed; the main rank keeps what it is packed to."""
        held = self._part(part).weight.data
        for e, packed in zip(batch, _of_all_ranks(own, self._how), strict=False):
            held[e] = ops.nf4_dequantize(packed, held.dtype)
            if collectives.rank(self._how.group) == 0:
                self._packed.setdefault(part, {})[e] = packed

    def _hidden(self, e: int, x_nD: Tensor) -> Tensor:
        """What an expert's down projection sees, [n, J]."""
        gate_nJ, up_nJ = (
            F.linear(x_nD, linears.weight[e], None if linears.bias is None else linears.bias[e])
            for linears in map(self._part, GATE_UP)
        )
        return self._experts.glu(gate_nJ, up_nJ)

    def _demand_finite(self) -> None:
        """On every rank of every expert's weights: a cast of the stored ones can overflow."""
        for part in (*GATE_UP, *DOWN):
            for e, weight_NK in enumerate(self._part(part).weight):
                formats.refuse_not_finite(formats.all_finite(weight_NK), self._weight_name(part, e))

    def _part(self, part: str) -> ExpertLinears:
        linears = self._experts.get_submodule(part)
        assert isinstance(linears, ExpertLinears)
        return linears

    def _weight_name(self, part: str, e: int) -> str:
        return f"{self._name}.{part}.weight[{e}]"


def widened(own: SecondMoments, of_all: SecondMoments | None) -> bool:
    """Add as many tokens to an expert's ``own`` as there are columns, so that few of them do not decide alone; whether
    there are too few even so to make up for errors by.

    Args:
        own: changed.
        of_all: of the layer's tokens, which those added are like. None where columns are the expert's alone: then they
            use all columns alike.
    """
    K, tokens = own.sum_KK.shape[0], own.tokens
    if of_all is None:
        own.add_even(K)
        return tokens < K // _FEWEST
    own.add_like(of_all, K)
    return of_all.tokens < K


def _of_all_ranks(own: PackedWeight, how: Calibration) -> list[PackedWeight]:
    assert own.absmax_scales is not None
    assert own.absmax_offset is not None
    parts = own.codes, own.absmax, own.absmax_scales, own.absmax_offset
    codes, absmax, scales, offset = (collectives.all_gather(part, how.group) for part in parts)
    of_ranks = PackedExpertWeights(codes, absmax, scales, offset, own.quant_format)
    return [of_ranks.expert(rank) for rank in range(collectives.size(how.group))]
