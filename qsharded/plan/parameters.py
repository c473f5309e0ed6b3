"""The bytes of a model's parameters on one rank, by class, from the real model built on the meta device."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qsharded.distributed import fsdp
from qsharded.distributed.choose_layout import SHARDED, Layout, is_vocab_parallel
from qsharded.models import CausalLM
from qsharded.models.parts import head_of, layers_of, part_names
from qsharded.quant.packed_module import PackedModule
from qsharded.utils.sharding import rows_of_rank

CODES, SCALES, EMBEDDING, ADAPTERS = "codes", "scales", "embedding and head", "adapters"
UNPACKED, OTHERS = "not quantized", "norms and others"
"""Classes of parameters. Adapters are everything that trains. Not quantized are matrices that could be, or are in
tensors of more dimensions (other experts, convolutions): frozen and in 16 or 32 bits, as the others."""


@dataclass(frozen=True)
class Held:
    """Bytes of parameters on one rank, and what of them comes together at a time.

    Attributes:
        resident: class -> bytes on the GPU.
        on_host: bytes of frozen weights in host memory.
        pinned: what those take there, page-locked.
        layer: the largest layer's bytes when FSDP2 gathers it; 0 where nothing is sharded.
        vocabulary: the largest bytes of embedding or head when they are gathered; 0 where they stay where they are.
        streamed: the largest layer's frozen bytes as they come from the host, whole.
        head_from_host: bytes of this rank's rows of the head, which come from the host for the loss.
        layer_gradient: fp32 bytes of the largest layer's gradients before they are scattered, plus this rank's part.
    """

    resident: Counter[str] = field(default_factory=Counter)
    on_host: int = 0
    pinned: int = 0
    layer: int = 0
    vocabulary: int = 0
    streamed: int = 0
    head_from_host: int = 0
    layer_gradient: int = 0


def parameters(
    model: CausalLM,
    *,
    ranks: int,
    rank: int = 0,
    layout: Layout = SHARDED,
    param_dtype: torch.dtype | None = None,
) -> Held:
    """What one rank holds of a model on the meta device; rank 0 holds the most.

    Args:
        model: as ``checkpoint.load.skeleton`` makes it.
        ranks: that share the model; 1 is a model that is not sharded.
        rank: whose bytes are asked for.
        layout: where the frozen weights are.
        param_dtype: as for ``parallel.shard``.
    """
    host, whole = _on_host(model, layout), _whole(model, layout)
    resident = Counter(dict.fromkeys((CODES, SCALES, UNPACKED, EMBEDDING, OTHERS, ADAPTERS), 0))
    for kind, tensor in tensors_by_class(model):
        if tensor not in host:
            resident[kind] += tensor.nbytes if tensor in whole else own_bytes(tensor, ranks, rank)
    gathered = _Gathered(model, ranks, host | whole | _split(model, layout, ranks), param_dtype)
    return Held(
        resident,
        on_host=sum(own_bytes(tensor, ranks, rank) for tensor in host),
        pinned=sum(pinned_bytes(own_bytes(tensor, ranks, rank)) for tensor in host),
        layer=gathered.layer(),
        vocabulary=gathered.vocabulary(),
        streamed=max(sum(padded_bytes(p, ranks) for p in set(layer.parameters()) & host) for layer in layers_of(model)),
        head_from_host=sum(own_bytes(p, ranks, rank) for p in set(head_of(model).parameters()) & host),
        layer_gradient=gathered.layer_gradient(),
    )


def pinned_bytes(nbytes: int) -> int:
    """What a tensor in page-locked memory takes: PyTorch's allocator rounds each up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def own_bytes(tensor: Tensor, ranks: int, rank: int) -> int:
    """Of a parameter the bytes of the rank's rows; a buffer is whole on every rank."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.nbytes
    start, stop = rows_of_rank(tensor.shape[0], ranks, rank)
    return tensor[:1].nbytes * (stop - start)


def padded_bytes(parameter: Tensor, ranks: int) -> int:
    """Of a parameter the bytes once gathered: every rank's part is padded to as many rows as the first has."""
    return own_bytes(parameter, ranks, 0) * ranks


def _on_host(model: CausalLM, layout: Layout) -> set[Tensor]:
    """The layers' frozen parameters, and embedding and head where those can be split."""
    if not layout.on_host:
        return set()
    frozen = {p for layer in layers_of(model) for p in layer.parameters() if not p.requires_grad}
    return frozen | _split(model, layout, 1)


def _whole(model: CausalLM, layout: Layout) -> set[Tensor]:
    return {p for p in model.parameters() if layout.replicated and not p.requires_grad}


def _split(model: CausalLM, layout: Layout, ranks: int) -> set[Tensor]:
    """Embedding and head, where they are cut by rows that never come together."""
    if not is_vocab_parallel(model, layout, ranks > 1):
        return set()
    return {model.embedding_weight, head_of(model).weight}


def tensors_by_class(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """(class, tensor) of every parameter, a tied one once, and of every buffer."""
    seen: set[Tensor] = set()
    for prefix, module in model.named_modules():
        named = [*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False)]
        for name, tensor in named:
            if tensor not in seen:
                seen.add(tensor)
                yield _class_of(model, module, name, tensor), tensor


def _class_of(model: CausalLM, module: nn.Module, name: str, tensor: Tensor) -> str:
    if tensor.requires_grad:
        return ADAPTERS
    if isinstance(module, PackedModule) and tensor is not getattr(module, "bias", None):
        return CODES if tensor is module.weight else SCALES
    parts = part_names(model)
    if name.startswith((f"{parts.embedding}.", f"{parts.head}.")):
        return EMBEDDING
    is_matrix = isinstance(tensor, nn.Parameter) and tensor.dim() >= 2
    is_bias = name.endswith(".bias")  # of experts, one a row
    return UNPACKED if is_matrix and not is_bias and not getattr(module, "is_router", False) else OTHERS


@dataclass(frozen=True)
class _Gathered:
    """What FSDP2 gathers of a model: all but the parameters ``left`` to others."""

    model: CausalLM
    ranks: int
    left: set[Tensor]
    param_dtype: torch.dtype | None

    def layer(self) -> int:
        return self._largest(is_layer=True)

    def vocabulary(self) -> int:
        return self._largest(is_layer=False)

    def layer_gradient(self) -> int:
        if self.ranks == 1:
            return 0
        trained = (
            sum(self._values(p) for p in layer.parameters() if p.requires_grad) for layer in layers_of(self.model)
        )
        return max(trained) * torch.float32.itemsize * (self.ranks + 1) // self.ranks

    def _largest(self, *, is_layer: bool) -> int:
        if self.ranks == 1:
            return 0
        layers = set(layers_of(self.model))
        chosen = [modules for modules in fsdp.groups(self.model) if (modules[0] in layers) == is_layer]
        return max((self._bytes(modules) for modules in chosen), default=0)

    def _bytes(self, modules: list[nn.Module]) -> int:
        distinct = {parameter for module in modules for parameter in module.parameters()} - self.left
        return sum(self._values(p) * (self.param_dtype or p.dtype).itemsize for p in distinct)

    def _values(self, parameter: Tensor) -> int:
        return padded_bytes(parameter, self.ranks) // parameter.itemsize
