"""Optimizer state on the move: between shards, and from and to bitsandbytes.

State is what ``PagedAdamW8bit.state_dict`` has of a parameter. Blocks of 256 are counted in the whole parameter, so
cutting a parameter into shards keeps every code and scale. Joining shards keeps them too, but for a block that two shards
hold in part, each under its own scale: its values are encoded anew. That moves a moment by at most half the largest gap of
its map, 0.0071 (first moment) or 0.0036 (second) of the block's largest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qsharded.blockwise8 import BLOCK, dynamic_map
from qsharded.optim import reference
from qsharded.optim.shards import first_value, local

State = Mapping[str, Any]
_MOMENTS = (("state1", "absmax1", True), ("state2", "absmax2", False))
_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"


def part_of(state: State, parameter: Tensor) -> dict[str, Any]:
    """The part of ``state`` that the local shard of ``parameter`` needs, in its shape.

    Raises:
        ValueError: state of another shape, or of a shard that does not hold these values.
    """
    held = local(parameter)
    first, count = first_value(parameter), held.numel()
    offset = first - state["first_value"]
    if not 0 <= offset <= state["state1"].numel() - count or state["values"] not in (parameter.numel(), count):
        raise ValueError(
            f"optimizer state holds values {state['first_value']} to {state['first_value'] + state['state1'].numel()} of "
            f"{state['values']}, a shard of {tuple(parameter.shape)} needs {first} to {first + count}: join the state of "
            "all ranks with qsharded.optim.state.merged"
        )
    part = dict(state) | {"first_value": first}
    before = state["first_value"] // BLOCK
    blocks = slice(first // BLOCK - before, _end_block(first, count) - before) if count else slice(0, 0)
    for codes, scales, _ in _MOMENTS:
        part[codes] = state[codes].reshape(-1)[offset : offset + count].view(held.shape)
        if scales in state:
            part[scales] = state[scales][blocks]
    return part


def _end_block(first: int, count: int) -> int:
    return -(-(first + count) // BLOCK)


def merged(state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict of whole parameters from the state dicts of all ranks of a sharding.

    Raises:
        ValueError: shards that do not make whole parameters.
    """
    first = state_dicts[0]
    states = {index: _joined([one["state"][index] for one in state_dicts]) for index in first["state"]}
    return dict(first) | {"state": states}


def _joined(states: Sequence[State]) -> dict[str, Any]:
    """Shards of one parameter, in any order; replicas count once."""
    shards = [state for _, state in sorted({s["first_value"]: s for s in states if s["state1"].numel()}.items())]
    whole = dict(states[0]) | {"first_value": 0}
    total = 0
    for shard in shards:
        if shard["first_value"] != total:
            raise ValueError(f"values from {total} on are missing: give the state dicts of all ranks")
        total += shard["state1"].numel()
    if total != whole["values"]:
        raise ValueError(f"{total} of {whole['values']} values: give the state dicts of all ranks")
    for codes, scales, signed in _MOMENTS:
        whole[codes] = torch.cat([shard[codes].reshape(-1) for shard in shards])
        if scales in whole:
            whole[scales] = _joined_scales(shards, whole[codes], codes, scales, signed)
    return whole


def _joined_scales(shards: Sequence[State], joined: Tensor, codes: str, scales: str, signed: bool) -> Tensor:
    """The scales of the joined codes, of which blocks that shards share are encoded anew."""
    absmax = torch.zeros(_end_block(0, joined.numel()))
    for shard in shards:
        first = shard["first_value"] // BLOCK
        absmax[first : first + shard[scales].numel()] = shard[scales]
    for block in {shard["first_value"] // BLOCK for shard in shards if shard["first_value"] % BLOCK}:
        values = torch.cat([_decoded(shard, block, codes, scales, signed) for shard in shards])
        part = slice(block * BLOCK, block * BLOCK + values.numel())
        reference.encode_(values, joined[part], absmax[block : block + 1], 0, signed=signed)
    return absmax


def _decoded(shard: State, block: int, codes: str, scales: str, signed: bool) -> Tensor:
    """The fp32 moments that ``shard`` holds of a block."""
    first, count = shard["first_value"], shard["state1"].numel()
    start, stop = max(block * BLOCK - first, 0), max(min((block + 1) * BLOCK - first, count), 0)
    number = block - first // BLOCK
    held = shard[codes].reshape(-1)[start:stop]
    return reference.decode(held, shard[scales][number : number + 1], 0, signed=signed) if held.numel() else held.float()


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
            if state[scales].numel() != _end_block(0, values):
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
