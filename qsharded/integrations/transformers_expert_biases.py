"""gpt-oss's biases of experts, as checkpoints hold them: gate's and up's in turn, where our modules have one each.

Axes: E experts, J intermediate size.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from qsharded.quant.experts import DOWN, GATE_UP
from qsharded.quant.fused_experts import SplitExperts, halves_of


def bias_rules(model: nn.Module) -> list[WeightTransform]:
    """How gpt-oss's biases are stored, for loading and, turned around, for saving."""
    if not any(isinstance(module, SplitExperts) and module.interleaved for module in model.modules()):
        return []
    gate, up, down = (f"experts.{part}_proj.bias" for part in ("gate", "up", "down"))
    return [
        WeightConverter(f"experts.{GATE_UP}_bias", [gate, up], [_TakeApart()]),
        WeightConverter(f"experts.{DOWN}_bias", down, [_Named()]),
    ]


class _TakeApart(ConversionOps):
    """Biases [E, 2J] become gate's and up's."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        [value] = map(_only, input_dict.values())
        return {name: half.contiguous() for name, half in zip(target_patterns, halves_of(value, True), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _PutTogether()


class _PutTogether(ConversionOps):
    """And back."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        halves = [_only(input_dict[name]) for name in source_patterns]
        return {target_patterns[0]: torch.stack(halves, dim=-1).flatten(-2)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _TakeApart()


class _Named(ConversionOps):
    """A tensor that is called otherwise, in the place of that name alone."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _only(next(iter(input_dict.values())))}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Named()


OPERATIONS = (_TakeApart, _Named)
"""Those of :func:`bias_rules`."""


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value
