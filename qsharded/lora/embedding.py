"""A low-rank adapter on an embedding, with PEFT's parameter names and values at the start.

Axes: V vocabulary, D hidden size, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.quant.unquantized import AdaptedLayer
from qsharded.utils.seeds import derived_seed


class LoRAEmbedding(AdaptedLayer):
    """``y = base(ids) + scaling * (B A)[:, ids]``: a frozen embedding and its trainable low-rank update.

    The rows looked up in A are cast to y's dtype for the product with B, as :class:`LoRALinear` does. There is no
    dropout: PEFT has none here.

    Attributes:
        base_layer: the frozen embedding, ids [...] -> [..., D].
        lora_embedding_A: [r, V], zeros at the start.
        lora_embedding_B: [D, r], drawn from a normal distribution.
        enabled: whether the update is added; see ``adapters_disabled``.
    """

    def __init__(self, base_layer: nn.Embedding, r: int, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer: nn.Module = base_layer
        self.scaling, self.padding_idx, self.enabled = scaling, base_layer.padding_idx, True
        device, (V, D) = base_layer.weight.device, base_layer.weight.shape
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, V, dtype=dtype, device=device))
        self.lora_embedding_B = nn.Parameter(torch.zeros(D, r, dtype=dtype, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D] in the base layer's dtype."""
        y: Tensor = self.base_layer(ids)
        if not self.enabled:
            return y
        narrow = F.embedding(ids, self.lora_embedding_A.T, self.padding_idx).to(y.dtype)
        return y + F.linear(narrow, self.lora_embedding_B.to(y.dtype)) * self.scaling

    def adapters(self) -> tuple[nn.Module]:
        """This module: the update's matrices are its own parameters."""
        return (self,)

    def updates(self) -> dict[str, Tensor]:
        """What trains, by its name in this layer."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def initial(self, name: str, seed: int) -> tuple[Tensor, Tensor]:
        """The values, in fp32 on the CPU, of :meth:`updates` at no change, for the layer called ``name``."""
        generator = torch.Generator().manual_seed(derived_seed(seed, name))
        B = torch.randn(self.lora_embedding_B.shape, generator=generator)
        return torch.zeros(self.lora_embedding_A.shape), B

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The update [V, D] in fp32 that A and B make."""
        return (B.float() @ A.float()).T * self.scaling

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}"
