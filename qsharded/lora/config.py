"""Which layers get adapters, of which rank and scaling: PEFT's settings, read as PEFT reads them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from qsharded.utils.argument_kinds import refuse_other_kind
from qsharded.utils.time_limit import TookTooLong, time_limited

ALL_LINEAR = "all-linear"
_SECONDS = 2.0  # of CPU time, for a pattern on one name; any that is meant takes microseconds


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how; the fields are PEFT's.

    Attributes:
        r: rank of the adapters.
        lora_alpha: the adapter's output is scaled by lora_alpha / r, with rsLoRA by lora_alpha / sqrt(r).
        lora_dropout: probability of zeroing an adapter's input while training.
        target_modules: "all-linear" (every linear but the output head), a list of name endings, or a regex that
            matches whole names. Endings and regexes may choose embeddings too.
        use_rslora: scale by lora_alpha / sqrt(r).
        rank_pattern, alpha_pattern: name ending or regex -> r or lora_alpha of the layers that it matches.
        modules_to_save: endings of the names of modules to train in full, kept out of quantization.
        target_parameters: endings of the names of parameters to adapt, as PEFT has them: experts'
            ("experts.down_proj"), or a linear layer's ("shared_experts.up_proj.weight"). "all-linear" has the experts'.
        exclude_modules: endings of names, or a regex of whole ones, that are no targets.
        layers_to_transform: numbers of the layers whose modules are targets; empty: all. As in PEFT, it does not hold
            for a whole name in ``target_modules``, nor where that is a regex.
        layers_pattern: regexes of what stands before a layer's number, ``layers``; empty: anything.
        dtype: of the trainable parameters, all of them: FSDP2 refuses mixtures.
        strict: refuse entries of target_modules, patterns and modules_to_save that match nothing. Not so for an adapter
            that exists already: its tensors say what it adapts, and PEFT reads it too.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    exclude_modules: str | list[str] = field(default_factory=list)
    layers_to_transform: list[int] = field(default_factory=list)
    layers_pattern: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    strict: bool = True

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            refuse_other_kind(r, int, "a LoRA rank", "a whole number")
            if r < 1:
                raise ValueError(f"a LoRA rank must be at least 1, got {r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            refuse_other_kind(alpha, (int, float), "lora_alpha", "a number")
        refuse_other_kind(self.lora_dropout, (int, float), "lora_dropout", "a number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"adapters are float32 or bfloat16, got {self.dtype}")

    def rank(self, name: str) -> int:
        """The rank of the layer called ``name``."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """What the adapter's output of the layer called ``name`` is multiplied by."""
        r = self.rank(name)
        return self.alpha(name) / (math.sqrt(r) if self.use_rslora else r)

    def alpha(self, name: str) -> float:
        """The alpha of the layer called ``name``."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def is_target(self, name: str) -> bool:
        """Whether the layer called ``name`` gets an adapter, if it is of a kind that can."""
        return not self.is_saved(name) and not _means(self.exclude_modules, name) and self.matches(name)

    def is_target_parameter(self, name: str) -> bool:
        """Whether the parameter called ``name`` is named: as PEFT, whatever layers and exclusions say."""
        return any(ends_with(name, ending) for ending in self.target_parameters)

    def adapts_experts(self, name: str) -> bool:
        """Whether the experts' parameter called ``name`` gets an adapter."""
        if self.is_target_parameter(name):
            return True
        module = name.rpartition(".")[0]
        return self.target_modules == ALL_LINEAR and self.is_target(module) and not _means(self.exclude_modules, name)

    def matches(self, name: str) -> bool:
        """Whether ``target_modules`` means the layer called ``name``, in the layers that are to be transformed."""
        if self.target_modules == ALL_LINEAR:
            return not ends_with(name, "lm_head") and self._is_in_layers(name)
        whole = isinstance(self.target_modules, str) or name in self.target_modules
        return _means(self.target_modules, name) and (whole or self._is_in_layers(name))

    def _is_in_layers(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        found = (_match(re.match, rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name) for pattern in patterns)
        first = next((match for match in found if match is not None), None)
        return first is not None and int(first["layer"]) in self.layers_to_transform

    def is_saved(self, name: str) -> bool:
        """Whether the module called ``name``, or one that it is part of, is trained in full."""
        return any(f".{target}." in f".{name}." for target in self.modules_to_save)


def _means(said: str | list[str], name: str) -> bool:
    """Whether ``said``, a regex of whole names or a list of endings, means ``name``."""
    if isinstance(said, str):
        return bool(said) and _match(re.fullmatch, said, name) is not None
    return any(ends_with(name, ending) for ending in said)


def ends_with(name: str, ending: str) -> bool:
    """Whether ``ending`` is the name's last parts, or all of it."""
    return name == ending or name.endswith("." + ending)


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if matches_pattern(pattern, name)), default)


def matches_pattern(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of patterns: an ending of the name, or a regex of one."""
    return _match(re.fullmatch, rf"(.*\.)?({pattern})", name) is not None


def _match(how: Callable[[str, str], re.Match[str] | None], pattern: str, name: str) -> re.Match[str] | None:
    """``how`` of ``re`` in bounded time: patterns come with adapters that are downloaded."""
    try:
        with time_limited(_SECONDS):
            return how(pattern, name)
    except TookTooLong:
        raise ValueError(
            f"the pattern {pattern[:200]!r} takes more than {_SECONDS:g} s of CPU time on {name!r}: it goes back and "
            "forth without end"
        ) from None
