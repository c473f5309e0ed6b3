"""What a transformers model does around its output head: nothing, a factor, or something of its own.

Its forward runs with the parts around the head replaced: a base that puts out given hidden states, and a linear layer
of our choice as the head. Nothing here knows a family's soft-cap or scale by name.

Axes: B rows, S tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from qsharded.models.chunked_loss import LOGITS_PER_CHUNK, capped
from qsharded.models.decoder import Head
from qsharded.models.parts import PartNames
from qsharded.models.transformers_code.structure import base_name
from qsharded.utils.documents import IGNORE

Linear = Callable[[Tensor], Tensor]


def own_logits(hf: Any, parts: PartNames, hidden_BSD: Tensor, linear: Linear) -> Tensor:
    """The logits that ``hf``'s own forward makes of the hidden states, with ``linear`` for its head's weights."""
    base = base_name(parts)
    head = _Product(hf.get_submodule(parts.head), linear)
    around = _Around(hf, {base: _Base(getattr(hf, base), hidden_BSD), parts.head: head})
    logits: Tensor = type(hf).forward(around, inputs_embeds=hidden_BSD, use_cache=False).logits
    return logits


class _Around:
    """A module as its own forward sees it, with other parts."""

    def __init__(self, module: Any, others: dict[str, Any]) -> None:
        self._module, self._others = module, others

    def __getattr__(self, name: str) -> Any:
        return self._others[name] if name in self._others else getattr(self._module, name)


class _Base(_Around):
    """A base that puts out given hidden states."""

    def __init__(self, base: Any, hidden_BSD: Tensor) -> None:
        super().__init__(base, {})
        self._hidden_BSD = hidden_BSD

    def __call__(self, *_: Any, **__: Any) -> "_Output":
        return _Output(last_hidden_state=self._hidden_BSD)


class _Product(_Around):
    """A head whose product is another function's; its attributes are its own."""

    def __init__(self, head: Any, linear: Linear) -> None:
        super().__init__(head, {})
        self._linear = linear

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._linear(hidden)


class _Output(BaseModelOutputWithPast):
    """A base's output, with nothing under whatever other name is asked for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass(frozen=True)
class AroundHead:
    """What stands around the head's product: c tanh(factor x / c), or without ``softcap`` c a factor alone; ``factor``
    None for anything else."""

    factor: float | None
    softcap: float | None = None


def around_head(hf: Any, parts: PartNames) -> AroundHead:
    """Find it by two probes: what reaches the head, and what becomes of its output. ``hf`` may be on the meta device.

    Raises:
        ValueError: the forward cannot be run so.
    """
    head = hf.get_submodule(parts.head)
    generator = torch.Generator().manual_seed(0)
    hidden_BSD = torch.randn(1, 3, head.in_features, generator=generator)
    # from where a soft-cap is straight to where it is flat
    logits_BSV = torch.randn(1, 3, head.out_features, generator=generator) * 20
    logits_BSV[0, 0, 0] = 1e6
    reached: list[Tensor] = []

    def probe(x: Tensor) -> Tensor:
        reached.append(x)
        return logits_BSV

    try:
        with torch.device("cpu"):
            made_BSV = own_logits(hf, parts, hidden_BSD, probe)
    except Exception as error:
        raise ValueError(f"{type(hf).__name__}: its forward cannot be run on hidden states alone: {error}") from error
    before = _ratio(reached[0], hidden_BSD) if len(reached) == 1 and head.bias is None else None
    if before is None:
        return AroundHead(None)
    after, softcap = _ratio(made_BSV, logits_BSV), _softcap(made_BSV, logits_BSV)
    return AroundHead(before, softcap) if softcap is not None else AroundHead(after and before * after)


def _ratio(made: Tensor, of: Tensor) -> float | None:
    """The factor between two tensors; None where there is more between them."""
    if made.shape != of.shape:
        return None
    largest = of.abs().argmax()
    factor = float(made.flatten()[largest].double() / of.flatten()[largest].double())
    return factor if torch.allclose(made.double(), of.double() * factor, rtol=1e-5, atol=0) else None


def _softcap(made: Tensor, of: Tensor) -> float | None:
    """The c of c tanh(x / c), at which the largest logits stand; None where it is something else."""
    cap = float(made.abs().max())
    if made.shape != of.shape or not cap:
        return None
    return cap if torch.allclose(made.double(), capped(of.double(), cap), rtol=1e-5, atol=1e-5) else None


class OwnHead(Head):
    """A head whose logits the model's own forward makes, chunk by chunk; each is made again in the backward."""

    def __init__(self, linear: nn.Linear, logits: Callable[[Tensor, Linear], Tensor]) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._own_logits = logits

    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None, *, per_token: bool = False) -> Tensor:
        """As :class:`Head`'s."""
        if targets_BS is None:
            return self._own_logits(hidden_BSD, self._linear)
        chunk = max(1, LOGITS_PER_CHUNK // self.out_features)
        pieces = zip(hidden_BSD.flatten(0, 1).split(chunk), targets_BS.flatten().split(chunk), strict=True)
        losses_T = torch.cat([self._again(hidden_CD, targets_C) for hidden_CD, targets_C in pieces])
        return -losses_T.view(targets_BS.shape) if per_token else losses_T.sum()

    def _linear(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)

    def _again(self, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        losses_C: Tensor = checkpoint(self._losses, hidden_CD, targets_C, use_reentrant=False)
        return losses_C

    def _losses(self, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        logits_CV = self._own_logits(hidden_CD[None], self._linear)[0]
        return F.cross_entropy(logits_CV.float(), targets_C, ignore_index=IGNORE, reduction="none")


def our_head(linear: nn.Linear, softcap: float | None) -> Head:
    """Our head with the weight of ``linear``, which has no bias."""
    head = Head(linear.in_features, linear.out_features, softcap, device="meta")
    head.weight = linear.weight
    return head
