"""Optimizer state on the move: between shards, and from and to bitsandbytes.

State is what ``PagedAdamW8bit.state_dict`` has of a parameter. Blocks of 256 are counted in the whole parameter, so
cutting a parameter into shards keeps every code and scale. Joining shards keeps them too, but for a block that two
shards hold in part, each under its own scale: its values are encoded anew. That moves a moment by at most half the
largest gap of its map, 0.0071 (first moment) or 0.0036 (second) of the block's largest.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qsharded.optim import reference
from qsharded.optim.local_values import first_value
from qsharded.quant.blockwise8 import BLOCK, dynamic_map
from qsharded.utils.sharding import local

State = Mapping[str, Any]
_MOMENTS = (("state1", "absmax1", True), ("state2", "absmax2", False))
_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"


def part_of(state: State, parameter: Tensor) -> dict[str, Any]:
    """The part of ``state`` that the local shard of ``parameter`` needs, in its shape, as views.

    Raises:
        ValueError: state of another parameter, or of shards that do not hold these values.
    """
    held = local(parameter)
    first, count = first_value(parameter), held.numel()
    start, stop = _range(state)
    if count and not start <= first <= first + count <= stop:
        raise ValueError(
            f"optimizer state holds values {start} to {stop} of {state['values']}, this shard of a parameter "
            f"{tuple(parameter.shape)} needs {first} to {first + count}: join the state of all ranks with "
            "qsharded.optim.state.merged"
        )
    if state["values"] not in (parameter.numel(), count):
        raise ValueError(f"optimizer state is of {state['values']} values, the parameter has {parameter.numel()}")
    before = start // BLOCK
    values = slice(first - start, first - start + count) if count else slice(0, 0)
    blocks = slice(first // BLOCK - before, _end_block(first + count) - before) if count else slice(0, 0)
    part = dict(state) | {"first_value": first}
    for codes, scales, _ in _MOMENTS:
        part[codes] = state[codes].reshape(-1)[values].view(held.shape)
        if scales in state:
            part[scales] = state[scales][blocks]
    return part


def merged(state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict of whole parameters from the state dicts of all ranks of a sharding, on the CPU.

    Raises:
        ValueError: shards that do not make whole parameters.
    """
    states = {index: joined([one["state"][index] for one in state_dicts]) for index in state_dicts[0]["state"]}
    for state in states.values():
        if _range(state) != (0, state["values"]):
            raise ValueError(f"{_range(state)} of {state['values']} values: give the state dicts of all ranks")
    return dict(state_dicts[0]) | {"state": states}


def joined(states: Sequence[State]) -> dict[str, Any]:
    """The state of consecutive values, on the CPU, from that of shards in any order; replicas count once.

    Raises:
        ValueError: values between the first and the last that no shard holds.
    """
    held = {state["first_value"]: state for state in states if state["state1"].numel()}
    shards = [{k: _on_cpu(v) for k, v in held[start].items()} for start in sorted(held)]
    if not shards:
        return dict(states[0])
    for shard, following in pairwise(shards):
        if _range(shard)[1] != following["first_value"]:
            raise ValueError(f"values {_range(shard)[1]} to {following['first_value']} are missing: give all shards")
    whole = dict(shards[0])
    for codes, scales, signed in _MOMENTS:
        whole[codes] = torch.cat([shard[codes].reshape(-1) for shard in shards])
        if scales in whole:
            whole[scales] = _joined_scales(shards, whole[codes], codes, scales, signed)
    return whole


def _joined_scales(shards: Sequence[State], joined_codes: Tensor, codes: str, scales: str, signed: bool) -> Tensor:
    """The scales of the joined codes, of which the blocks that shards share are encoded anew."""
    start, stop = shards[0]["first_value"], _range(shards[-1])[1]
    before = start // BLOCK
    absmax = torch.zeros(_end_block(stop) - before)
    for shard in shards:
        first = shard["first_value"] // BLOCK - before
        absmax[first : first + shard[scales].numel()] = shard[scales]
    for block in {shard["first_value"] // BLOCK for shard in shards[1:] if shard["first_value"] % BLOCK}:
        values = torch.cat([_dequantized(shard, block, codes, scales, signed) for shard in shards])
        at = max(block * BLOCK - start, 0)
        part = joined_codes[at : at + values.numel()]
        reference.quantize_state_(values, part, absmax[block - before : block - before + 1], 0, signed=signed)
    return absmax


def _dequantized(shard: State, block: int, codes: str, scales: str, signed: bool) -> Tensor:
    """The fp32 moments that ``shard`` holds of a block."""
    first, stop = _range(shard)
    held = slice(max(block * BLOCK - first, 0), max(min((block + 1) * BLOCK, stop) - first, 0))
    number = block - first // BLOCK
    scale = shard[scales][number : number + 1] if 0 <= number < shard[scales].numel() else torch.zeros(1)
    return reference.dequantize_state(shard[codes].reshape(-1)[held], scale, 0, signed=signed)


def _range(state: State) -> tuple[int, int]:
    """Which values of its parameter a state is of."""
    return state["first_value"], state["first_value"] + state["state1"].numel()


def _end_block(end: int) -> int:
    return -(-end // BLOCK)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Our state dict from that of bitsandbytes' AdamW8bit or PagedAdamW8bit (0.50), codes and scales as they are.

    Raises:
        ValueError: state on other maps than the dynamic ones, or in other blocks than 256.
    """
    groups = [
        {name: group[name] for name in ("lr", "eps", "weight_decay", "params")}
        | {"betas": tuple(group["betas"][:2]), "maximize": False}
        for group in state_dict["param_groups"]
    ]
    return {"state": {i: _from_bitsandbytes(state) for i, state in state_dict["state"].items()}, "param_groups": groups}


def _from_bitsandbytes(state: State) -> dict[str, Any]:
    state = {k: v for k, v in state.items() if k != _BITSANDBYTES_WRAPPER} | dict(state.get(_BITSANDBYTES_WRAPPER, {}))
    values = state["state1"].numel()
    ours = {"step": torch.tensor(float(state["step"])), "first_value": 0, "values": values}
    for number, (codes, scales, signed) in enumerate(_MOMENTS, 1):
        ours[codes] = state[codes]
        if scales in state:
            if not torch.equal(state[f"qmap{number}"].cpu(), dynamic_map(signed)):
                raise ValueError(f"qmap{number} is not the dynamic map of bitsandbytes' AdamW8bit")
            if state[scales].numel() != _end_block(values):
                raise ValueError(f"{scales} has {state[scales].numel()} scales for {values} values, not one for 256")
            ours[scales] = state[scales]
    return ours


def to_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict that bitsandbytes' AdamW8bit and PagedAdamW8bit (0.50) load, codes and scales as they are.

    Raises:
        ValueError: state of shards, or of an optimizer that maximizes.
    """
    if any(group["maximize"] for group in state_dict["param_groups"]):
        raise ValueError("bitsandbytes does not maximize: negate the loss instead")
    extra = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    groups = [{k: v for k, v in group.items() if k != "maximize"} | extra for group in state_dict["param_groups"]]
    return {"state": {i: _to_bitsandbytes(state) for i, state in state_dict["state"].items()}, "param_groups": groups}


def _to_bitsandbytes(state: State) -> dict[str, Any]:
    if state["state1"].numel() != state["values"]:
        raise ValueError("state of a shard: join that of all ranks with qsharded.optim.state.merged first")
    theirs = {"step": int(state["step"]), "state1": state["state1"], "state2": state["state2"]}
    for number, (_, scales, signed) in enumerate(_MOMENTS, 1):
        if scales in state:
            theirs |= {scales: state[scales], f"qmap{number}": dynamic_map(signed)}
    return theirs
