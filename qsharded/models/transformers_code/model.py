"""A transformers model with the interface of our decoder: same modules and names, our loss, attention and documents.

Axes: B batch, S sequence, T keys (the cache's and the S), D hidden size, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from qsharded.models.chunked_loss import capped
from qsharded.models.decoder import CausalLM, Head
from qsharded.models.parts import embedding_of, head_of
from qsharded.models.transformers_code import attention, buffers
from qsharded.models.transformers_code.attention import Rows
from qsharded.models.transformers_code.build import build
from qsharded.models.transformers_code.description import TransformersConfig
from qsharded.models.transformers_code.leaks import leaks
from qsharded.models.transformers_code.own_head import OwnHead, our_head, own_logits
from qsharded.models.transformers_code.structure import base_name, kept_whole
from qsharded.quant.fused_experts import SplitExperts, is_known, put_in_place
from qsharded.utils.documents import IGNORE, PADDING, Boundaries


class TransformersCausalLM(CausalLM):
    """What ``AutoModelForCausalLM`` gives, called as :class:`CausalLM` is. Its children are the model's own, so that
    parameters have the checkpoint's names.

    Attributes:
        config: what it was made from.
        hf: the model itself, which is no child: the two share their children.
    """

    config: TransformersConfig  # type: ignore[assignment]
    hf: Any

    def __init__(self, config: TransformersConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
        nn.Module.__init__(self)
        hf = build(config, dtype)
        self.config = config
        self.__dict__["hf"] = hf
        self.__dict__["_modules"] = hf._modules
        self._rows = Rows()
        self._refuse_lost_tensors()
        self._split_experts()
        self._dress()

    def _refuse_lost_tensors(self) -> None:
        for name in buffers.tensors_beside(self.hf):
            raise ValueError(f"{type(self.hf).__name__} keeps {name} outside of its buffers, where it cannot be loaded")

    def _split_experts(self) -> None:
        """Ours in the place of its experts, where their layout is known: one module for each projection."""
        for name, module in list(self.named_modules()):
            if is_known(module):
                put_in_place(self, name, SplitExperts(module).own_tensors())

    def _dress(self) -> None:
        """Our head in the place of its own; marks on what must stay as it is, and the rows where attention looks."""
        for linear in kept_whole(self.hf):
            linear.is_adaptable = False  # type: ignore[assignment]
        for module in self.modules():
            module.__dict__["rows"] = self._rows
        linear = head_of(self)
        ours = self.config.head_factor is not None
        head = our_head(linear, self.config.softcap) if ours else OwnHead(linear, self._own)
        self.set_submodule(self.config.parts.head, head)
        self.tie_weights()

    def _own(self, hidden_BSD: Tensor, linear: Any) -> Tensor:
        return own_logits(self.hf, self.config.parts, hidden_BSD, linear)

    @property
    def embedding_weight(self) -> nn.Parameter:
        """The embedding's, under what is wrapped around it."""
        embedding = embedding_of(self)
        return getattr(embedding, "base_layer", embedding).get_parameter("weight")

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's where the config ties them."""
        if self.config.tie_word_embeddings:
            head = head_of(self)
            getattr(head, "base_layer", head).weight = self.embedding_weight

    def fill_buffers(self) -> None:
        """Set what no checkpoint holds, once the model is in memory."""
        buffers.initialise(self.hf)

    def refuse_packing_that_leaks(self) -> None:
        """Raise ValueError where documents of a row would see each other. Every rank calls this, with weights there."""
        if leaks(self):
            raise ValueError(
                f"{type(self.hf).__name__} ({self.config.model_type}) lets documents of a packed row see each other: "
                "its layers carry a state, a convolution or a bias of their own across them. Leave out --packing"
            )

    def new_cache(self, length: int) -> "Cache":  # type: ignore[override]
        """An empty one, which grows."""
        return Cache(self.hf.config)

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        boundaries: Boundaries | None = None,
        targets_BS: Tensor | None = None,
        per_token: bool = False,
        cache: Any = None,
        last_only: bool = False,
    ) -> Tensor:
        """As :meth:`CausalLM.forward`."""
        hidden_BSD = self._hidden(input_ids_BS, positions_BS, document_ids_BS, boundaries, cache)
        if last_only:
            hidden_BSD = hidden_BSD[:, -1:]
        head = head_of(self)
        if not isinstance(head, Head):  # an adapter around it: the loss has to come from its logits
            return _of_logits(self._own(hidden_BSD, head), targets_BS, per_token)
        if self.config.head_factor not in (None, 1.0):
            hidden_BSD = hidden_BSD * self.config.head_factor
        logits_or_loss: Tensor = head(hidden_BSD, targets_BS, per_token=per_token)
        return capped(logits_or_loss, self.config.softcap) if targets_BS is None else logits_or_loss

    def _hidden(
        self,
        input_ids_BS: Tensor,
        positions_BS: Tensor | None,
        documents_BS: Tensor | None,
        boundaries: Boundaries | None,
        cache: "Cache | None",
    ) -> Tensor:
        past = 0 if cache is None else cache.length
        if positions_BS is None:
            positions_BS = torch.arange(past, past + input_ids_BS.shape[1], device=input_ids_BS.device)[None]
        documents_BT = documents_BS if cache is None else cache.documents(documents_BS)
        kept: dict[str, Any] = {} if cache is None else cache.arguments()
        if input_ids_BS.is_meta and self.config.attention != attention.NAME:
            # its code looks at values to tell documents apart; for plans a mask of that size does
            kept["attention_mask"] = _any_mask(input_ids_BS)
        # they stay until the next forward: a layer that is computed again asks for them in the backward
        self._rows.documents_BT, self._rows.boundaries, self._rows.made = documents_BT, boundaries, {}
        base = self.get_submodule(base_name(self.config.parts))
        out = base(
            input_ids=input_ids_BS,
            position_ids=positions_BS.expand(input_ids_BS.shape),
            use_cache=cache is not None,
            **kept,
        )
        if cache is not None:
            cache.length += input_ids_BS.shape[1]
        hidden_BSD: Tensor = out[0]
        return hidden_BSD


def _any_mask(ids_BS: Tensor) -> Tensor:
    B, S = ids_BS.shape
    return torch.ones(B, 1, S, S, dtype=torch.bool, device=ids_BS.device)


def _of_logits(logits_BSV: Tensor, targets_BS: Tensor | None, per_token: bool) -> Tensor:
    if targets_BS is None:
        return logits_BSV
    cross_entropy = partial(F.cross_entropy, ignore_index=IGNORE, reduction="none" if per_token else "sum")
    losses = cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
    return -losses.view(targets_BS.shape) if per_token else losses


class Cache:
    """transformers' cache, and which of the tokens in it are padding."""

    def __init__(self, config: Any) -> None:
        self.length = 0
        self._kept = DynamicCache(config=config)
        self._documents_BT: Tensor | None = None

    def documents(self, documents_BS: Tensor | None) -> Tensor | None:
        """The document ids of all tokens, these included."""
        if self._documents_BT is not None and documents_BS is not None:
            documents_BS = torch.cat((self._documents_BT, documents_BS), dim=1)
        self._documents_BT = documents_BS
        return documents_BS

    def arguments(self) -> dict[str, Any]:
        """What the model is called with beside ids and positions."""
        mask = None if self._documents_BT is None else (self._documents_BT != PADDING).long()
        return {"past_key_values": self._kept, "attention_mask": mask}
