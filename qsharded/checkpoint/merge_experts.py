"""An adapter folded into a checkpoint's experts, in the layout in which they are stored.

Axes: E experts, N = out_features, K = in_features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from qsharded.checkpoint.expert_fills import experts_in
from qsharded.checkpoint.expert_layouts import Layout, layout_of
from qsharded.checkpoint.load import checkpoint_name
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.lora.experts import LoRAExperts
from qsharded.lora.layer import lora_layers
from qsharded.quant import formats
from qsharded.quant.experts import DOWN, GATE_UP, PackedExperts
from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import rounded

_PART_OF = {"gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1), "down_proj": (DOWN, None)}

Factors = Callable[[str, LoRAExperts], tuple[Tensor, Tensor]]
"""From the name and the module of an adapter to its A and B."""


@dataclass(frozen=True)
class _Projection:
    """One projection of all experts of a layer.

    Attributes:
        half: of the adapted parameter's rows: 0 gate's, 1 up's; None: all.
        quant_format: to which its matrices are rounded first, or None.
        adapter: (name, module), or None.
    """

    name: str
    layout: Layout
    half: int | None
    is_interleaved: bool
    quant_format: QuantFormat | None
    adapter: tuple[str, LoRAExperts] | None


class ExpertMerge:
    """What becomes of the tensors that hold experts.

    Args:
        model: the skeleton, with its adapters.
        quant_format: to round to first, where the model's experts are packed; or None.
        factors: reads an adapter's.
    """

    def __init__(
        self, model: nn.Module, source: SafetensorsFolder, quant_format: QuantFormat | None, factors: Factors
    ) -> None:
        self._of_tensor: dict[str, list[_Projection]] = {}
        for projection, tensors in _projections(model, source, quant_format):
            for tensor in tensors:
                self._of_tensor.setdefault(tensor, []).append(projection)
        self._updates = lru_cache(maxsize=2)(lambda name, layer: layer.by_expert(*factors(name, layer)))

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._of_tensor

    def merged(self, tensor: str, stored: Tensor) -> Tensor:
        """``stored`` with its experts' updates; sums are taken in fp32 and rounded once."""
        new = stored.clone()
        for projection in self._of_tensor[tensor]:
            for e, matrix_NK in projection.layout.matrices(tensor, new):
                matrix_NK.copy_(self._base(projection, e, matrix_NK) + self._delta(projection, e))
        return new

    def _base(self, projection: _Projection, e: int, matrix_NK: Tensor) -> Tensor:
        if projection.quant_format is None:
            return matrix_NK.float()
        formats.check_weight(matrix_NK, projection.quant_format, f"{projection.name}[{e}]")
        return rounded(matrix_NK.contiguous(), projection.quant_format)

    def _delta(self, projection: _Projection, e: int) -> Tensor | float:
        if projection.adapter is None:
            return 0.0
        name, layer = projection.adapter
        A_ErK, B_ENr = self._updates(name, layer)
        B_Nr = B_ENr[e]
        if projection.half is not None:
            half = projection.half
            B_Nr = B_Nr[half::2] if projection.is_interleaved else B_Nr.chunk(2)[half]
        return B_Nr.float() @ A_ErK[e].float() * layer.scaling


def _projections(
    model: nn.Module, source: SafetensorsFolder, quant_format: QuantFormat | None
) -> Iterator[tuple[_Projection, list[str]]]:
    """Those that change, with the tensors that hold them."""
    adapters = {
        (checkpoint_name(f"{name}."), layer.parameter): (name, layer)
        for name, layer in lora_layers(model)
        if isinstance(layer, LoRAExperts)
    }
    for name, experts in experts_in(model):
        parent, _, part = checkpoint_name(f"{name}.")[:-1].rpartition(".")
        parameter, half = _PART_OF[part]
        rounds = quant_format if isinstance(experts, PackedExperts) else None
        adapter = adapters.get((f"{parent}.", parameter))
        if rounds is not None or adapter is not None:
            layout = layout_of(source, f"{parent}.{part}.weight")
            tensors = layout.shapes(experts.out_features, experts.in_features, experts.experts)
            is_interleaved = bool(getattr(model.get_submodule(name.rpartition(".")[0]), "interleaved", False))
            yield _Projection(name, layout, half, is_interleaved, rounds, adapter), list(tensors)
