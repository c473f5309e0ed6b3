"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the ways checkpoints stretch it.

Axes: B batch, S sequence, H heads, E head dim, R rotated dims of a head (E, or fewer).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# rope_type -> (keys it must have, keys it may have), rope_theta and rotary_fraction aside
_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "ntk-alpha": (frozenset({"alpha"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), frozenset({"original_length"})),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {"original_length", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        ),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"original_length", "attention_factor", "factor"}),
    ),
}
_RENAMED = {
    "type": "rope_type",
    "original_max_position_embeddings": "original_length",
    "partial_rotary_factor": "rotary_fraction",
}


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. `original_length` (tokens) is the context before stretching.

    `rotary_fraction` of a head's dims, the first ones, are rotated. "longrope" divides frequencies by `short_factor`
    in documents of up to `original_length` tokens and by `long_factor` in longer ones (arXiv:2402.13753); "ntk-alpha"
    stretches `rope_theta` by a fixed `alpha`.
    """

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
    rotary_fraction: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    alpha: float = 1.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Read the `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4) of a config.json.

        Raises ValueError naming a rope type or key that is not known, or a key that is missing.
        """
        return cls.of(config.get("rope_scaling") or config.get("rope_parameters") or {}, config)

    @classmethod
    def of(cls, given: Mapping[str, Any], config: Mapping[str, Any]) -> "RopeConfig":
        """Of one set of rope parameters; what it leaves out is the config.json's own. Errors as :meth:`from_hf`."""
        raw = {key: value for key, value in given.items() if value is not None}
        if "rope_type" in raw:
            raw.pop("type", None)  # its older spelling, which transformers reads only where the newer one is missing
        values = {_RENAMED.get(key, key): value for key, value in raw.items()}
        values.setdefault("rope_type", "default")
        if config.get("original_max_position_embeddings"):  # beside the rope's own, it counts
            values["original_length"] = config["original_max_position_embeddings"]
        if values["rope_type"] == "yarn" and "factor" in given and "factor" not in values:
            longest = config["max_position_embeddings"]
            values["factor"] = longest / values.get("original_length", longest)
        values.setdefault("rope_theta", config.get("rope_theta") or cls.rope_theta)
        values.setdefault("rotary_fraction", config.get("partial_rotary_factor") or 1.0)
        _check_keys(values)
        values = {key: value for key, value in values.items() if key not in _unused(values["rope_type"])}
        values.setdefault("original_length", config["max_position_embeddings"])
        if values["rope_type"] == "longrope":
            values.setdefault("factor", config["max_position_embeddings"] / values["original_length"])
            values |= {key: tuple(values[key]) for key in ("short_factor", "long_factor")}
        return cls(**values)

    def check(self, head_dim: int) -> None:
        """Raise ValueError where heads of ``head_dim`` cannot be rotated so."""
        pairs = self.rotary_dim(head_dim) // 2
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if self.rope_type == "longrope" and len(factors) != pairs:
                raise ValueError(f"rope key {name!r} has {len(factors)} entries for {pairs} rotated pairs of a head")
        if self.rope_type == "longrope" and self.original_length < 2:  # by whose logarithm attention is scaled
            raise ValueError("original_max_position_embeddings must be above 1 for rope_type 'longrope', got 1")
        if self.rope_type == "ntk-alpha" and pairs < 2:
            raise ValueError(f"rope_type 'ntk-alpha' needs more than one rotated pair of a head, got {pairs}")

    def rotary_dim(self, head_dim: int) -> int:
        """R: how many dims of a head are rotated."""
        return int(head_dim * self.rotary_fraction)


def _unused(rope_type: str) -> set[str]:
    """Keys of other types, which transformers passes over."""
    used = frozenset().union(*_KEYS[rope_type])
    return set().union(*(required | optional for required, optional in _KEYS.values())) - used


def _check_keys(values: Mapping[str, Any]) -> None:
    rope_type = values["rope_type"]
    if rope_type not in _KEYS:
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(_KEYS)}")
    required, optional = _KEYS[rope_type]
    given = values.keys() - {"rope_type", "rope_theta", "rotary_fraction"}
    for key in sorted(required - given):
        raise ValueError(f"rope_type {rope_type!r} needs {key!r}, which the checkpoint's config does not give")
    for key in sorted(given - required - optional - _unused(rope_type)):
        raise ValueError(f"rope key {key!r} ({values[key]!r}) is not known for rope_type {rope_type!r}")


def rope_tables(
    rope: RopeConfig, head_dim: int, positions_BS: Tensor, dtype: torch.dtype, is_long: bool | Tensor = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, S, R]` of every angle, computed in fp32 and returned in `dtype`.

    is_long: for "longrope", whether a token's document is longer than the original context: one for all, or `[B, S]`.
    """
    half_BSF = positions_BS[..., None].float() * _chosen_frequencies(rope, head_dim, positions_BS.device, is_long)
    angles_BSR = torch.cat((half_BSF, half_BSF), dim=-1)
    scale = _attention_factor(rope)
    return (angles_BSR.cos() * scale).to(dtype), (angles_BSR.sin() * scale).to(dtype)


def _chosen_frequencies(rope: RopeConfig, head_dim: int, device: torch.device, is_long: bool | Tensor) -> Tensor:
    """[R / 2], or [B, S, R / 2] where documents differ."""

    def frequencies(is_long: bool) -> Tensor:
        # They come from the CPU so that every device rotates by the same fp32 angles.
        return _frequencies(rope, head_dim, is_long).to(device, non_blocking=True)

    if isinstance(is_long, Tensor):
        return torch.where(is_long[..., None], frequencies(True), frequencies(False))
    return frequencies(is_long)


def rotate(x_BHSE: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs of a head's first R dims by their position's angle; the rest of the head stays.

    Pairs are (i, i + R/2), as in most Hugging Face checkpoints, or neighbours (2i, 2i + 1) where `interleaved`.
    """
    R = cos_BSR.shape[-1]
    if x_BHSE.shape[-1] > R:
        turned = rotate(x_BHSE[..., :R], cos_BSR, sin_BSR, interleaved=interleaved)
        return torch.cat((turned, x_BHSE[..., R:]), dim=-1)
    if interleaved:
        cos_BSR, sin_BSR = (table[..., : R // 2].repeat_interleave(2, dim=-1) for table in (cos_BSR, sin_BSR))
        even, odd = x_BHSE[..., ::2], x_BHSE[..., 1::2]
        crossed = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        low, high = x_BHSE.chunk(2, dim=-1)
        crossed = torch.cat((-high, low), dim=-1)
    return x_BHSE * cos_BSR[:, None] + crossed * sin_BSR[:, None]


def frequency_divisors(rope: RopeConfig, head_dim: int) -> Tensor:
    """How many times slower each pair turns than without stretching, fp32 `[R / 2]`, on CPU."""
    return _frequencies(replace(rope, rope_type="default"), head_dim) / _frequencies(rope, head_dim)


def _frequencies(rope: RopeConfig, head_dim: int, is_long: bool = False) -> Tensor:
    """Radians per position, fp32 `[R / 2]`, on CPU."""
    R = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R
    if rope.rope_type == "ntk-alpha":
        return 1.0 / (rope.rope_theta * rope.alpha ** (R / (R - 2))) ** exponents
    plain = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, plain)
    if rope.rope_type == "yarn":
        return _yarn(rope, R, plain)
    if rope.rope_type == "longrope":
        return plain / torch.tensor(rope.long_factor if is_long else rope.short_factor, device="cpu")
    # "dynamic" is plain up to max_position_embeddings; the decoder refuses longer rows.
    return plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: waves longer than the old context are slowed, short ones kept, those between blended."""
    turns = rope.original_length * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, rotary_dim: int, plain: Tensor) -> Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071), section 3.2: a ramp over dimensions from kept to slowed."""
    low = _yarn_dimension(rope, rotary_dim, rope.beta_fast)
    high = _yarn_dimension(rope, rotary_dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low or 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return plain * (1 - ramp) + plain / rope.factor * ramp


def _yarn_dimension(rope: RopeConfig, rotary_dim: int, turns: float) -> float:
    """The (fractional) pair that makes `turns` full turns over the original context."""
    return rotary_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))


def _attention_factor(rope: RopeConfig) -> float:
    """YaRN's and LongRoPE's temperature, folded into cosines and sines; 1 for every other type."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope":
        return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    if rope.mscale and rope.mscale_all_dim:
        return yarn_temperature(rope.factor, rope.mscale) / yarn_temperature(rope.factor, rope.mscale_all_dim)
    return yarn_temperature(rope.factor, 1.0)


def yarn_temperature(factor: float, mscale: float) -> float:
    """By which q and k grow where positions are stretched by ``factor``: YaRN's, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
