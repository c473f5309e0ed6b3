"""Experts that transformers' loader reads: packed on their way, one at a time, into the projections that we have.

A model's :class:`SplitExperts` have other tensors than the two that transformers' rules of loading make of a
checkpoint. While a checkpoint in 16 bits is read, these two are among the model's names all the same (:func:`expect`);
what is read for them goes to :func:`packed_parameters`.

Axes: E experts, N = out_features, K = in_features.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from qsharded.checkpoint.expert_fills import ExpertPacking
from qsharded.checkpoint.fill_shards import FiniteCheck
from qsharded.distributed.agreement import refused_by_all
from qsharded.quant.experts import DOWN, GATE_UP, PackedExperts
from qsharded.quant.fused_experts import SplitExperts, halves_of, is_known
from qsharded.quant.packed_weight import QuantizedAbsmax, pad_absmax
from qsharded.utils.sharding import RowRange, own_rows

_PARTS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
_HOOK = "qsharded_expected"

Matrix = Callable[[int, int], Tensor]
"""Of expert e and the i-th of the projections that share a tensor, its matrix [N, K]."""


def of_experts(model: nn.Module, name: str) -> SplitExperts | None:
    """The experts of which ``name`` is a tensor of matrices in transformers' layout."""
    prefix, _, tensor = name.rpartition(".")
    if tensor not in _PARTS:
        return None
    module = model.get_submodule(prefix)
    return module if isinstance(module, SplitExperts) else None


def expect(model: nn.Module) -> None:
    """Have transformers' tensors of experts among the names that the loader looks for."""
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.__dict__[_HOOK] = module.register_state_dict_post_hook(_name_theirs)


def expect_no_more(model: nn.Module) -> None:
    """The names are the model's own again."""
    for module in model.modules():
        if hook := module.__dict__.pop(_HOOK, None):
            hook.remove()


def refuse_half_packed(model: nn.Module, is_quantized: Callable[[str, nn.Module], bool]) -> None:
    """Raise ValueError for experts of a packed checkpoint of which one projection is in 16 bits, since its rows are no
    whole blocks: a model of transformers holds all projections packed or none."""
    for name, module in model.named_modules():
        if is_known(module) and all(is_quantized(f"{name}.{part}", linears) for part, linears in _taken_apart(module)):
            raise ValueError(
                f"{name}: the rows of one of its projections are no whole blocks, so the checkpoint holds it in 16 "
                "bits, beside packed ones; qsharded.load_model reads that, transformers does not"
            )


def _taken_apart(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return SplitExperts(module).linears().items()


def _name_theirs(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _PARTS:
        state_dict[prefix + name] = torch.empty(module.stored_shapes()[name], dtype=torch.bfloat16, device="meta")


def packed_parameters(model: nn.Module, name: str, stored: Any, missing: set[str] | None) -> dict[str, Tensor]:
    """What :class:`SplitExperts` hold of the tensor ``name``, this rank's rows, by the model's names.

    Args:
        stored: the tensor, whole; or a function that reads one matrix of it.
        missing: names that the loader still looks for; this one is found.
    """
    if missing is not None:
        missing.discard(name)
    prefix, _, tensor = name.rpartition(".")
    experts: Any = model.get_submodule(prefix)
    matrix = stored if callable(stored) else _matrices(experts, tensor, stored)
    made: dict[str, Tensor] = {}
    for index, part in enumerate(_PARTS[tensor]):
        made |= _packed(experts.get_submodule(part), f"{prefix}.{part}.weight", index, matrix)
    return made


def _matrices(experts: SplitExperts, tensor: str, stored: Tensor) -> Matrix:
    turned = stored.transpose(1, 2) if experts.interleaved else stored
    parts = (turned,) if tensor == DOWN else halves_of(turned, experts.interleaved)
    return lambda e, index: parts[index][e]


def _packed(linears: Any, name: str, index: int, matrix: Matrix) -> dict[str, Tensor]:
    """One projection, packed as the native loader does it."""
    assert isinstance(linears, PackedExperts)
    rows, N = own_rows(linears.weight), linears.out_features
    sink, finite = _Sink(), FiniteCheck(name)
    packing = ExpertPacking(linears.experts, linears.in_features, rows, linears.quant_format, sink)
    for e in range(rows.start // N, -(-rows.stop // N)):
        own_nK = matrix(e, index)[max(rows.start - e * N, 0) : rows.stop - e * N].contiguous()
        finite.add(own_nK)
        packing.put(max(rows.start, e * N), own_nK)
    device = own_nK.device if rows.count else matrix(0, index).device
    with refused_by_all([rows.group] if rows.group else [], device):
        finite.demand()
    packing.finish(device)
    return sink.parameters(name, linears, rows, device)


class _Sink:
    """Keeps what is packed."""

    def __init__(self) -> None:
        self._codes: list[Tensor] = []
        self._absmax: QuantizedAbsmax | None = None

    def put_codes(self, first: int, codes_NP: Tensor) -> None:
        self._codes.append(codes_NP)

    def put_absmax(self, absmax: QuantizedAbsmax) -> None:
        self._absmax = absmax

    def parameters(self, name: str, linears: PackedExperts, rows: RowRange, device: torch.device) -> dict[str, Tensor]:
        assert self._absmax is not None
        none = torch.empty(0, linears.in_features // 2, dtype=torch.uint8, device=device)
        return {
            name: torch.cat([none, *self._codes]).view(torch.bfloat16),
            f"{name}_absmax": pad_absmax(self._absmax.codes).view(torch.bfloat16),
            f"{name}_absmax_scales": self._absmax.scales,
            f"{name}_absmax_offset": self._absmax.offset,
        }


class ExpertByExpert(WeightConverter):
    """A rule that stacks experts' tensors, in whose place each is read when it is packed, and let go."""

    __slots__ = ()

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> Any:
        """What transformers' loader asks of a rule; experts that stay in 16 bits are stacked as before."""
        if self.quantization_operation is None or of_experts(model, layer_name) is None:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        unread, self.collected_tensors = self.collected_tensors, defaultdict(list)
        tensors = [unread[pattern] for pattern in self.source_patterns]
        _refuse_other_count(layer_name, tensors, model)
        missing = loading_info and loading_info.missing_keys
        return packed_parameters(model, layer_name, lambda e, index: _read(tensors[index][e]), missing)


def _read(tensor: Any) -> Tensor:
    """The loader's promise of a tensor, or itself."""
    value: Tensor = tensor() if callable(tensor) else tensor.result() if hasattr(tensor, "result") else tensor
    return value


def _refuse_other_count(name: str, tensors: list[list[Any]], model: nn.Module) -> None:
    experts = of_experts(model, name)
    assert experts is not None
    E = experts.gate_proj.experts
    for of_pattern in tensors:
        if len(of_pattern) != E:
            raise ValueError(f"{name} is stacked of {len(of_pattern)} experts, config.json asks for {E}")


def one_at_a_time(rule: Any) -> Any:
    """``rule`` of transformers' loading, reading experts one by one if it stacks their tensors."""
    stack, *join = getattr(rule, "operations", None) or [None]
    stacks = type(stack) is MergeModulelist and stack.dim == 0
    joins = not join or (len(join) == 1 and type(join[0]) is Concatenate and join[0].dim == 1)
    if type(rule) is WeightConverter and stacks and joins and len(rule.source_patterns) == 1 + len(join):
        rule.__class__ = ExpertByExpert
    return rule
