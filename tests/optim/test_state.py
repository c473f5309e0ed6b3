"""Optimizer state between shards, and from and to bitsandbytes."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded.optim import PagedAdamW8bit
from qsharded.optim.state import from_bitsandbytes, joined, merged, to_bitsandbytes
from qsharded.quant.blockwise8 import dequantize, dynamic_map
from tests.kernels.cases import assert_same_bits
from tests.optim import cases
from tests.optim.test_paged_adamw8bit import assert_same_state

VALUES = 5000
HALF_A_GAP = {"1": 0.9 / 64 / 2, "2": 0.9 / 128 / 2}


def shard(start: int, stop: int, seed: int = 0) -> dict[str, Any]:
    """State of the values [start, stop) of 5,000, with random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (2, VALUES), dtype=torch.uint8, generator=generator)
    scales = torch.rand(2, 20, generator=generator) + 0.1
    blocks = slice(start // 256, -(-stop // 256) if stop > start else start // 256)
    state: dict[str, Any] = {"step": torch.tensor(3.0), "first_value": start, "values": VALUES}
    for number in (1, 2):
        state[f"state{number}"] = codes[number - 1, start:stop]
        state[f"absmax{number}"] = scales[number - 1, blocks]
    return state


def dequantized(state: dict[str, Any], number: str) -> Tensor:
    lead, count = state["first_value"] % 256, state["state1"].numel()
    scales = state[f"absmax{number}"].repeat_interleave(256)[lead : lead + count]
    return dequantize(state[f"state{number}"], scales, number == "1")


@pytest.mark.parametrize("cuts", [[256], [1024, 4096], [300], [100, 200, 2570], [5000], [0, 4999]])
def test_shards_of_one_optimizer_join_to_its_state(cuts: list[int]) -> None:
    """They have the same scales for a block that they share, which are encoded anew within half a gap."""
    edges = [0, *cuts, VALUES]
    whole = joined([shard(start, stop) for start, stop in pairwise(edges)][::-1])
    expected, shared = shard(0, VALUES), {cut // 256 for cut in cuts if cut % 256}
    for number in ("1", "2"):
        for block in range(20):
            values = slice(block * 256, (block + 1) * 256)
            if block not in shared:
                assert_same_bits(whole[f"state{number}"][values], expected[f"state{number}"][values])
                assert_same_bits(whole[f"absmax{number}"][block], expected[f"absmax{number}"][block])
        error = (dequantized(whole, number) - dequantized(expected, number)).abs()
        scale = whole[f"absmax{number}"].repeat_interleave(256)[:VALUES]
        assert (error <= HALF_A_GAP[number] * scale * 1.0001).all()
        assert (error == 0).float().mean() > 0.8


def test_a_shared_block_under_two_scales_keeps_its_values_within_half_a_gap() -> None:
    parts = [shard(0, 300, seed=1), shard(300, VALUES, seed=2)]
    whole = joined(parts)
    for number in ("1", "2"):
        values = torch.cat([dequantized(part, number) for part in parts])
        error = (dequantized(whole, number) - values).abs()
        scale = whole[f"absmax{number}"].repeat_interleave(256)[:VALUES]
        assert (error <= HALF_A_GAP[number] * scale * 1.0001).all()
        assert (error[256:512] > 0).any()
        assert (error[:256] == 0).all()
        assert (error[512:] == 0).all()
        assert scale[256] == values[256:512].abs().max()


def test_replicas_count_once_and_empty_shards_not_at_all() -> None:
    parts = [shard(0, 2560), shard(2560, VALUES), shard(2560, VALUES), shard(VALUES, VALUES)]
    assert_same_state({0: joined(parts)}, {0: shard(0, VALUES)})


def test_missing_shards_are_named() -> None:
    with pytest.raises(ValueError, match="values 256 to 512 are missing"):
        joined([shard(0, 256), shard(512, VALUES)])
    with pytest.raises(ValueError, match="give the state dicts of all ranks"):
        merged([{"state": {0: shard(0, 256)}, "param_groups": []}])


def test_state_of_another_parameter_is_refused() -> None:
    optimizer = PagedAdamW8bit([nn.Parameter(torch.zeros(VALUES + 1))])
    groups = optimizer.state_dict()["param_groups"]
    with pytest.raises(
        ValueError, match=r"values 0 to 5000 of 5000, this shard of a parameter \(5001,\) needs 0 to 5001"
    ):
        optimizer.load_state_dict({"state": {0: shard(0, VALUES)}, "param_groups": groups})
    optimizer = PagedAdamW8bit([nn.Parameter(torch.zeros(VALUES - 1))])
    with pytest.raises(ValueError, match="of 5000 values, the parameter has 4999"):
        optimizer.load_state_dict({"state": {0: shard(0, VALUES)}, "param_groups": groups})


def test_state_of_another_optimizer_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(VALUES))
    rows = SimpleNamespace(start=0, stop=VALUES, tensors={"step": torch.tensor(1.0), "exp_avg": torch.zeros(VALUES)})
    with pytest.raises(ValueError, match="another optimizer's: step, exp_avg"):
        PagedAdamW8bit([parameter]).set_parameter_state(parameter, [rows])


def bitsandbytes_optimizer(steps: int) -> tuple[Any, nn.Parameter, nn.Parameter]:
    import bitsandbytes

    large, small = nn.Parameter(torch.ones(70, 70)), nn.Parameter(torch.ones(50))
    optimizer = bitsandbytes.optim.AdamW8bit([large, small], lr=1e-2, weight_decay=0.1)
    cases.train(optimizer, steps)
    return optimizer, large, small


def test_state_comes_from_bitsandbytes_and_goes_back() -> None:
    theirs, *held = bitsandbytes_optimizer(2)
    ours = PagedAdamW8bit([nn.Parameter(p.detach().clone()) for p in held])
    ours.load_state_dict(from_bitsandbytes(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-2, (0.9, 0.999), 0.1)
    for mine, its in zip(group["params"], held, strict=True):
        assert ours.state[mine]["step"] == 2
        for name in ("state1", "state2", *(["absmax1", "absmax2"] if its.numel() >= 4096 else [])):
            assert_same_bits(ours.state[mine][name], theirs.state[its][name])
    back, *_ = bitsandbytes_optimizer(0)
    back.load_state_dict(to_bitsandbytes(ours.state_dict()))
    for its, original in zip(back.param_groups[0]["params"], held, strict=True):
        assert back.state[its].keys() == theirs.state[original].keys()
        assert back.state[its]["step"] == 2
        for name, value in theirs.state[original].items():
            if isinstance(value, Tensor):
                assert_same_bits(back.state[its][name], value)
    cases.train(back, 1)  # it goes on


def test_what_does_not_convert_is_named() -> None:
    theirs, *_ = bitsandbytes_optimizer(1)
    other = theirs.state_dict()
    other["state"][0]["__bnb_optimizer_quant_state__"]["qmap1"] = dynamic_map(True).flip(0)
    with pytest.raises(ValueError, match="qmap1 is not the dynamic map"):
        from_bitsandbytes(other)
    with pytest.raises(ValueError, match="does not maximize"):
        to_bitsandbytes(PagedAdamW8bit([nn.Parameter(torch.ones(3))], maximize=True).state_dict())
    with pytest.raises(ValueError, match="state of a shard"):
        to_bitsandbytes({"state": {0: shard(0, 256)}, "param_groups": []})
