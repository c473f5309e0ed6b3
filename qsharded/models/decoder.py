"""The decoder of every family, under the module names of their checkpoints.

Read from top to bottom: layer, stack, head, model; a layer's attention is in self_attention.py, its MLP in mlp.py or,
where it is a mixture of experts, in mixture.py.
What a family has beyond Llama is in its configuration. Nothing here knows of sharding, quantization or
adapters: those replace modules from outside, and any Linear may become another module that maps x to y.

Axes: B batch, S sequence, T keys (S, and before them the cache's), D hidden size, H query heads, G key-value heads,
E head dim, V vocabulary.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.attention_inputs import AttentionInputs, attention_inputs
from qsharded.models.chunked_loss import capped, chunked_cross_entropy, chunked_log_probs
from qsharded.models.config import ModelConfig
from qsharded.models.gated_delta_net import FusedDeltaNet, GatedDeltaNet
from qsharded.models.kv_cache import KVCache
from qsharded.models.mixture import MixtureMLP
from qsharded.models.mlp import make_mlp
from qsharded.models.norm import rms_norm
from qsharded.models.self_attention import self_attention
from qsharded.utils.documents import IGNORE, Boundaries


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after them or both. The unit that is
    sharded."""

    input_layernorm: nn.RMSNorm  # these two and others, as ``config.norms`` says
    post_attention_layernorm: nn.RMSNorm
    self_attn: Any  # of the kind that ``config`` describes, or a gated delta-net, ``linear_attn``
    mlp: Any  # of one projection after the other, or a mixture of experts

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        if config.is_linear[layer]:
            is_fused = config.linear is not None and config.linear.fused
            self.linear_attn = (FusedDeltaNet if is_fused else GatedDeltaNet)(config, layer)
        else:
            self.self_attn = self_attention(config, layer)
        self.mlp = MixtureMLP(config) if config.is_sparse[layer] else make_mlp(config)
        for name in config.norms.names():
            self.add_module(name, rms_norm(config, config.hidden_size))

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """One layer: x [B, S, D] -> [B, S, D]."""
        norms = self.config.norms
        attends = getattr(self, "self_attn", None) or self.linear_attn
        attended_BSD = attends(self._norm(norms.before_attention, x_BSD), inputs, cache)
        x_BSD = x_BSD + self._scaled(self._norm(norms.after_attention, attended_BSD))
        return x_BSD + self.added_by_mlp(self._norm(norms.before_mlp, x_BSD), inputs)

    def added_by_mlp(self, x_BSD: Tensor, inputs: AttentionInputs) -> Tensor:
        """What the MLP adds to the residual stream, [B, S, D], of its normalised input."""
        y_BSD = self.mlp(x_BSD, inputs.is_routed_BS) if isinstance(self.mlp, MixtureMLP) else self.mlp(x_BSD)
        return self._scaled(self._norm(self.config.norms.after_mlp, y_BSD))

    def _norm(self, name: str | None, x_BSD: Tensor) -> Tensor:
        return x_BSD if name is None else self.get_submodule(name)(x_BSD)

    def _scaled(self, added_BSD: Tensor) -> Tensor:
        multiplier = self.config.residual_multiplier
        return added_BSD if multiplier == 1 else added_BSD * multiplier


class Decoder(nn.Module):
    """Embedding, layers and last norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = rms_norm(config, config.hidden_size)

    def forward(
        self,
        input_ids_BS: Tensor,
        positions_BS: Tensor | None,
        documents_BS: Tensor | None,
        boundaries: Boundaries | None,
        cache: KVCache | None,
    ) -> Tensor:
        length = input_ids_BS.shape[1]
        past = 0 if cache is None else cache.length
        self._check_length(past, length)
        documents_BT = documents_BS if cache is None else cache.reserve(length, documents_BS)
        if positions_BS is None:
            positions_BS = torch.arange(past, past + length, device=input_ids_BS.device)[None]

        # Nothing of these depends on the layer, but for its window and its rotary embedding.
        inputs = attention_inputs(
            self.config,
            positions_BS.expand(input_ids_BS.shape),
            self.dtype,
            documents_BT=documents_BT,
            boundaries=boundaries,
            keys=past + length,
        )
        hidden_BSD = self.through_layers(input_ids_BS, inputs, cache)
        if cache is not None:
            cache.advance(length)
        return hidden_BSD

    def through_layers(
        self, input_ids_BS: Tensor, inputs: tuple[AttentionInputs, ...], cache: KVCache | None
    ) -> Tensor:
        """Hidden states [B, S, D]; ``inputs``: each layer's in turn."""
        x_BSD = self._embedded(input_ids_BS)
        for layer, of_layer in zip(self.layers, inputs, strict=True):
            x_BSD = layer(x_BSD, of_layer, cache)
        return self.norm(x_BSD)

    def _embedded(self, input_ids_BS: Tensor) -> Tensor:
        x_BSD = self.embed_tokens(input_ids_BS).to(self.dtype)  # an embedding that is trained may be wider
        multiplier = self.config.embedding_multiplier
        if multiplier == 1:
            return x_BSD
        if self.config.embedding_multiplier_rounded:
            multiplier = _rounded(multiplier, x_BSD.dtype)
        return x_BSD * multiplier

    def _check_length(self, past: int, length: int) -> None:
        rope, limit = self.config.rope, self.config.max_position_embeddings
        if rope.rope_type == "dynamic" and past + length > limit:
            raise ValueError(
                f"rows of {past + length} tokens: with rope_type 'dynamic' at most max_position_embeddings = {limit} "
                "are supported, as beyond it a token's rotation would depend on the longest row of its batch"
            )
        if rope.rope_type == "longrope" and 0 < past <= rope.original_length < past + length:
            raise ValueError(
                f"with rope_type 'longrope' a text's rotation changes as it grows beyond {rope.original_length} "
                "tokens, and the cached keys have the shorter one's: ask for fewer new tokens, or begin with a longer "
                "prompt"
            )


@cache  # found before a step is captured, which cannot ask for a value
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype, device="cpu").item()


class Head(nn.Linear):
    """Hidden states to logits or, given targets, straight to the loss or the targets' log-probabilities.

    Both live in this forward so that whatever gathers the weight around a module's call (FSDP) does so once. Losses are
    of logits that are soft-capped; logits alone are not yet, since an adapter around the head adds to them.
    """

    is_head = True
    """For ``all-linear``, which leaves it out whatever its name is."""

    def __init__(self, in_features: int, out_features: int, softcap: float | None = None, **options: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **options)
        self.softcap = softcap

    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None, *, per_token: bool = False) -> Tensor:
        weight_VD = self.weight.to(hidden_BSD.dtype)  # a head that is trained in full has a wider master
        if targets_BS is None:
            return F.linear(hidden_BSD, weight_VD)
        if per_token:
            return chunked_log_probs(hidden_BSD.flatten(0, 1), weight_VD, targets_BS, softcap=self.softcap)
        return chunked_cross_entropy(hidden_BSD.flatten(0, 1), weight_VD, targets_BS.flatten(), softcap=self.softcap)


class CausalLM(nn.Module):
    """A decoder with its language-model head. It holds no buffers but those that checkpoints
    have: meta construction and to_empty lose nothing."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype)
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.logit_softcap)
        self.to(dtype)
        self.tie_weights()

    @property
    def embedding_weight(self) -> nn.Parameter:
        """The embedding's, under what is wrapped around it."""
        return getattr(self.model.embed_tokens, "base_layer", self.model.embed_tokens).get_parameter("weight")

    def adapter_name(self, name: str) -> str:
        """What PEFT calls the module or parameter ``name`` in transformers' model of the same checkpoint: in a
        multimodal model the text part lies one deeper."""
        inside = name.removeprefix("model.")
        return f"model.language_model.{inside}" if self.config.wrapper and inside != name else name

    def fill_buffers(self) -> None:
        """Set what no checkpoint holds, once the model is in memory: nothing here."""

    def refuse_packing_that_leaks(self) -> None:
        """Raise ValueError where documents of a row would see each other: never here."""

    def new_cache(self, length: int) -> KVCache:
        """An empty one, for rows of up to ``length`` tokens."""
        return KVCache(self.config.num_hidden_layers, length)

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's Parameter where the config ties them (again, after a replacement)."""
        if self.config.tie_word_embeddings:
            getattr(self.lm_head, "base_layer", self.lm_head).weight = self.embedding_weight

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        boundaries: Boundaries | None = None,
        targets_BS: Tensor | None = None,
        per_token: bool = False,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits `[B, S, V]`, or the fp32 sum of the token losses where `targets_BS` is given.

        positions_BS: each token's place in its document, from 0; None counts from the row's (or cache's) start.
        document_ids_BS: int64; tokens see earlier tokens of equal id only; -1 marks padding. None: a row is a document.
        boundaries: those of document_ids_BS, where they are known: a GPU would be waited for to find them.
        targets_BS: int64, already shifted: what position s predicts stands at s; -100 is not trained on.
        per_token: with targets_BS, their fp32 log-probabilities `[B, S]` instead; 0 where not trained on.
        cache: tokens read before these, extended by these. last_only: logits `[B, 1, V]` of the last position.

        Raises ValueError where the cache is full, or a row longer than a "dynamic" rope supports.
        """
        hidden_BSD = self.model(input_ids_BS, positions_BS, document_ids_BS, boundaries, cache)
        if last_only:
            hidden_BSD = hidden_BSD[:, -1:]
        if targets_BS is None:
            return self._logits(hidden_BSD)
        hidden_BSD = self._for_head(hidden_BSD)
        if isinstance(self.lm_head, Head):
            return self.lm_head(hidden_BSD, targets_BS, per_token=per_token)
        # A head that was replaced (by LoRA, say) maps x to y and no more: the loss has to come from its logits.
        logits_BSV = self.lm_head(hidden_BSD)
        logits_TV, targets_T = logits_BSV.flatten(0, 1).float(), targets_BS.flatten()
        logits_TV = capped(logits_TV, self.config.logit_softcap)
        if per_token:
            losses_T = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="none")
            return -losses_T.view(targets_BS.shape)
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")

    def step(self, input_ids_B1: Tensor, attention: tuple[AttentionInputs, ...], cache: KVCache) -> Tensor:
        """Logits `[B, 1, V]` of one more token a row, from a caller who sees to positions, padding and the cache's
        length. attention: what each layer attends with."""
        return self._logits(self.model.through_layers(input_ids_B1, attention, cache))

    def _for_head(self, hidden_BSD: Tensor) -> Tensor:
        multiplier = self.config.logit_multiplier
        return hidden_BSD if multiplier == 1 else hidden_BSD * multiplier

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        return capped(self.lm_head(self._for_head(hidden_BSD)), self.config.logit_softcap)
