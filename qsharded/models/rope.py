"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the ways checkpoints stretch it.

Axes: B batch, S sequence, H heads, E head dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# rope_type -> (keys it must have, keys it may have), rope_theta aside
_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), frozenset({"original_length"})),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {"original_length", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        ),
    ),
}
_RENAMED = {"type": "rope_type", "original_max_position_embeddings": "original_length"}


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. `original_length` (tokens) is the context before stretching."""

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Read the `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4) of a config.json.

        Raises ValueError naming a rope type or key that is not known, or a key that is missing.
        """
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        raw = {key: value for key, value in given.items() if value is not None}
        if "rope_type" in raw:
            raw.pop("type", None)  # its older spelling, which transformers reads only where the newer one is missing
        values = {_RENAMED.get(key, key): value for key, value in raw.items()}
        values.setdefault("rope_type", "default")
        values.setdefault("rope_theta", config.get("rope_theta") or cls.rope_theta)
        if values.get("partial_rotary_factor", 1.0) == 1.0:
            values.pop("partial_rotary_factor", None)
        _check_keys(values)
        values.setdefault("original_length", config["max_position_embeddings"])
        return cls(**values)


def _check_keys(values: Mapping[str, Any]) -> None:
    rope_type = values["rope_type"]
    if rope_type not in _KEYS:
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(_KEYS)}")
    required, optional = _KEYS[rope_type]
    given = values.keys() - {"rope_type", "rope_theta"}
    for key in sorted(required - given):
        raise ValueError(f"rope_type {rope_type!r} needs {key!r}, which the checkpoint's config does not give")
    for key in sorted(given - required - optional):
        raise ValueError(f"rope key {key!r} ({values[key]!r}) is not known for rope_type {rope_type!r}")


def rope_tables(rope: RopeConfig, head_dim: int, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, S, E]` of every angle, computed in fp32 and returned in `dtype`."""
    # The frequencies come from the CPU so that every device rotates by the same fp32 angles.
    frequencies_E = _frequencies(rope, head_dim).to(positions_BS.device, non_blocking=True)
    half_BSE = positions_BS[..., None].float() * frequencies_E
    angles_BSE = torch.cat((half_BSE, half_BSE), dim=-1)
    scale = _attention_factor(rope)
    return (angles_BSE.cos() * scale).to(dtype), (angles_BSE.sin() * scale).to(dtype)


def rotate(x_BHSE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Rotate each pair (i, i + E/2) of a head by its position's angle: the pairing of Hugging Face checkpoints."""
    low, high = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos_BSE[:, None] + torch.cat((-high, low), dim=-1) * sin_BSE[:, None]


def frequency_divisors(rope: RopeConfig, head_dim: int) -> Tensor:
    """How many times slower each pair turns than without stretching, fp32 `[E / 2]`, on CPU."""
    return _frequencies(replace(rope, rope_type="default"), head_dim) / _frequencies(rope, head_dim)


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position, fp32 `[E / 2]`, on CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, plain)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, plain)
    # "dynamic" is plain up to max_position_embeddings; the decoder refuses longer rows.
    return plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: waves longer than the old context are slowed, short ones kept, those between blended."""
    turns = rope.original_length * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, head_dim: int, plain: Tensor) -> Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071), section 3.2: a ramp over dimensions from kept to slowed."""
    low = _yarn_dimension(rope, head_dim, rope.beta_fast)
    high = _yarn_dimension(rope, head_dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return plain * (1 - ramp) + plain / rope.factor * ramp


def _yarn_dimension(rope: RopeConfig, head_dim: int, turns: float) -> float:
    """The (fractional) pair that makes `turns` full turns over the original context."""
    return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))


def _attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature, folded into cosines and sines; 1 for every other type."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_temperature(rope.factor, rope.mscale) / _yarn_temperature(rope.factor, rope.mscale_all_dim)
    return _yarn_temperature(rope.factor, 1.0)


def _yarn_temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
