"""Adapter files with a tensor for each expert, as models of transformers 4 gave them.

There, an expert's projections were linear layers: `mlp.experts.3.gate_proj.lora_A.weight` [r, K] and so on, in Mixtral
`block_sparse_moe.experts.3.w1...`. Gate and up had an A each, and here they share one: of both ranks together, gate's
rows before up's, with a B that has each one's part in its own rows and columns and zeros elsewhere. The update is the
same to the last bit but for the order of sums.

Axes: E experts, r rank of all that is put together, K in_features, N out_features.
"""

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qsharded.lora.config import LoRAConfig
from qsharded.quant.experts import DOWN, GATE_UP

logger = logging.getLogger(__name__)

_NAME = re.compile(
    r"(?P<mixture>.*)\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\."
    r"(?P<part>gate_proj|up_proj|down_proj|w[123])\.lora_(?P<end>[AB])\.weight"
)
_PARTS = {"gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1), "down_proj": (DOWN, 0)}
_PARTS |= {"w1": _PARTS["gate_proj"], "w3": _PARTS["up_proj"], "w2": _PARTS["down_proj"]}


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the experts of a layer: for each half that is adapted the files' names, expert by expert."""

    experts: str
    parameter: str
    halves: dict[int, list[str]]  # half -> names up to ".lora_A.weight", of experts 0 to E - 1

    @property
    def name(self) -> str:
        """The parameter's, as PEFT calls it."""
        return f"{self.experts}.{self.parameter}"


def is_per_expert(names: Iterable[str]) -> bool:
    """Whether a file with these tensors is such a one."""
    return any(_NAME.fullmatch(name) for name in names)


class PerExpertFile:
    """An open safetensors file, with its experts' tensors put together. It is read like the file itself."""

    def __init__(self, file: Any) -> None:
        self._file = file
        names = list(file.keys())
        self._others = [name for name in names if not _NAME.fullmatch(name)]
        self._parameters = _parameters(names)
        nested = {p.experts for p in self._parameters if p.parameter == DOWN}
        self._made: dict[str, tuple[_Parameter, str]] = {}
        for parameter in self._parameters:
            # of two adapted parameters the first is nested in the second
            inner = ".base_layer" if parameter.parameter == GATE_UP and parameter.experts in nested else ""
            for end in "AB":
                self._made[f"{parameter.experts}{inner}.lora_{end}.weight"] = parameter, end
        self._stacked = lru_cache(maxsize=4)(self._stack)

    def __enter__(self) -> "PerExpertFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        """The tensors' names."""
        return [*self._others, *self._made]

    def metadata(self) -> dict[str, str] | None:
        """The file's."""
        found: dict[str, str] | None = self._file.metadata()
        return found

    def get_tensor(self, name: str) -> Tensor:
        """A tensor."""
        return self._stacked(name) if name in self._made else self._file.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """What its shape can be asked of, and rows."""
        return _Whole(self._stacked(name)) if name in self._made else self._file.get_slice(name)

    def adapts(self, lora: LoRAConfig) -> LoRAConfig:
        """``lora``, which names the experts' projections as layers, with their parameters named.

        Raises:
            ValueError: gate and up are scaled otherwise.
        """
        ranks, alphas = dict(lora.rank_pattern), dict(lora.alpha_pattern)
        for parameter in self._parameters:
            name = parameter.name.removeprefix(_PREFIX)
            ranks[re.escape(name)] = rank = self._rank(parameter)
            alphas[re.escape(name)] = _scaling(lora, parameter) * (math.sqrt(rank) if lora.use_rslora else rank)
        named = {f"experts.{parameter.parameter}" for parameter in self._parameters}
        if lora.lora_dropout:
            logger.warning("lora_dropout = %g is left out: adapters on experts have none", lora.lora_dropout)
        # first come, first served: whole names before the patterns of linear layers
        ranks = {**{key: ranks[key] for key in ranks if key not in lora.rank_pattern}, **lora.rank_pattern}
        alphas = {**{key: alphas[key] for key in alphas if key not in lora.alpha_pattern}, **lora.alpha_pattern}
        targets = sorted({*lora.target_parameters, *named})
        return replace(lora, target_parameters=targets, rank_pattern=ranks, alpha_pattern=alphas, lora_dropout=0.0)

    def _rank(self, parameter: _Parameter) -> int:
        return sum(self._shape(names[0], "A")[0] for names in parameter.halves.values())

    def _shape(self, name: str, end: str) -> list[int]:
        return list(self._file.get_slice(f"{name}.lora_{end}.weight").get_shape())

    def _stack(self, name: str) -> Tensor:
        parameter, end = self._made[name]
        of_experts = zip(*parameter.halves.values(), strict=True)
        make = self._A if end == "A" else self._B
        made = [make(dict(zip(parameter.halves, names, strict=True)), parameter.parameter) for names in of_experts]
        if end == "A":
            return torch.cat(made)
        return torch.stack(made, dim=-1).flatten(1)  # [N, r, E]: expert-minor

    def _A(self, halves: dict[int, str], _: str) -> Tensor:
        return torch.cat([self._file.get_tensor(f"{name}.lora_A.weight") for name in halves.values()])

    def _B(self, halves: dict[int, str], parameter: str) -> Tensor:
        given = {half: self._file.get_tensor(f"{name}.lora_B.weight") for half, name in halves.items()}
        N = next(iter(given.values())).shape[0]
        whole = torch.zeros(N * (2 if parameter == GATE_UP else 1), sum(B.shape[1] for B in given.values()))
        first = 0
        for half, B in given.items():
            whole[half * N : (half + 1) * N, first : first + B.shape[1]] = B
            first += B.shape[1]
        return whole.to(next(iter(given.values())).dtype)


_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Whole:
    """A tensor in memory, as a slice of a file is read."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """The tensor's."""
        return list(self.tensor.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


def _parameters(names: Iterable[str]) -> list[_Parameter]:
    """Those that a file adapts.

    Raises:
        ValueError: an expert has no adapter though others have.
    """
    found: dict[tuple[str, str], dict[int, dict[int, str]]] = {}
    for name in names:
        matched = _NAME.fullmatch(name)
        if matched is not None:
            parameter, half = _PARTS[matched["part"]]
            halves = found.setdefault((f"{matched['mixture']}.mlp.experts", parameter), {})
            halves.setdefault(half, {})[int(matched["expert"])] = name.rpartition(".lora_")[0]
    for (experts, parameter), halves in found.items():
        known = {len(of_half) for of_half in halves.values()}
        if len(known) != 1 or any(sorted(of_half) != list(range(*known)) for of_half in halves.values()):
            raise ValueError(f"not every expert has an adapter on {experts}.{parameter}: the adapter is damaged")
    return [
        _Parameter(experts, parameter, {half: [of[e] for e in sorted(of)] for half, of in sorted(halves.items())})
        for (experts, parameter), halves in found.items()
    ]


def _scaling(lora: LoRAConfig, parameter: _Parameter) -> float:
    scalings = {lora.scaling(names[0].removeprefix(_PREFIX)) for names in parameter.halves.values()}
    if len(scalings) != 1:
        raise ValueError(f"gate and up of {parameter.experts} are scaled otherwise: they share an adapter here")
    return scalings.pop()
