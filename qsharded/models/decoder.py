"""The decoder of Llama, Mistral, Qwen2, Qwen3 and SmolLM2, under the module names of their checkpoints.

Read from top to bottom: attention, MLP, layer, stack, head, model. Nothing here knows of sharding, quantization or
adapters: those replace modules from outside, and any Linear may become another module that maps x to y.

Axes: B batch, S sequence, T keys (S, and before them the cache's), D hidden size, H query heads, G key-value heads,
E head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.attention import attend
from qsharded.models.attention_inputs import AttentionInputs, attention_inputs
from qsharded.models.chunked_loss import chunked_cross_entropy, chunked_log_probs
from qsharded.models.config import ModelConfig
from qsharded.models.kv_cache import KVCache
from qsharded.models.rope import rotate
from qsharded.utils.documents import IGNORE, Boundaries


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped key-value heads and, in Qwen3, normalised q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_dim = config.num_attention_heads * config.head_dim
        key_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        tables = inputs.cos_BSE, inputs.sin_BSE
        q_BHSE = rotate(self.q_norm(self._heads(self.q_proj(x_BSD))).transpose(1, 2), *tables)
        k_BGTE = rotate(self.k_norm(self._heads(self.k_proj(x_BSD))).transpose(1, 2), *tables)
        v_BGTE = self._heads(self.v_proj(x_BSD)).transpose(1, 2)
        if cache is not None:
            k_BGTE, v_BGTE = cache.update(self.layer, k_BGTE, v_BGTE)
        y_BSHE = attend(q_BHSE.transpose(1, 2), k_BGTE.transpose(1, 2), v_BGTE.transpose(1, 2), inputs)
        return self.o_proj(y_BSHE.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream. The unit that is sharded."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """One layer: x [B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), inputs, cache)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class Decoder(nn.Module):
    """Embedding, layers and last norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

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
        self._check_length(past + length)
        documents_BT = documents_BS if cache is None else cache.reserve(length, documents_BS)
        if positions_BS is None:
            positions_BS = torch.arange(past, past + length, device=input_ids_BS.device)[None]

        x_BSD = self.embed_tokens(input_ids_BS).to(self.dtype)  # an embedding that is trained may be wider
        # Nothing of these depends on the layer, but for its window.
        inputs = attention_inputs(
            self.config,
            positions_BS.expand(input_ids_BS.shape),
            x_BSD.dtype,
            documents_BT=documents_BT,
            boundaries=boundaries,
            keys=past + length,
        )
        for layer, window in zip(self.layers, self.config.layer_windows, strict=True):
            x_BSD = layer(x_BSD, inputs[window], cache)
        if cache is not None:
            cache.advance(length)
        return self.norm(x_BSD)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if self.config.rope.rope_type == "dynamic" and length > limit:
            raise ValueError(
                f"rows of {length} tokens: with rope_type 'dynamic' at most max_position_embeddings = {limit} are "
                f"supported, as beyond it a token's rotation would depend on the longest row of its batch"
            )


class Head(nn.Linear):
    """Hidden states to logits or, given targets, straight to the loss or the targets' log-probabilities.

    Both live in this forward so that whatever gathers the weight around a module's call (FSDP) does so once.
    """

    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None, *, per_token: bool = False) -> Tensor:
        weight_VD = self.weight.to(hidden_BSD.dtype)  # a head that is trained in full has a wider master
        if targets_BS is None:
            return F.linear(hidden_BSD, weight_VD)
        if per_token:
            return chunked_log_probs(hidden_BSD.flatten(0, 1), weight_VD, targets_BS)
        return chunked_cross_entropy(hidden_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())


class CausalLM(nn.Module):
    """A decoder with its language-model head. It holds no buffers: meta construction and to_empty lose nothing."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)
        self.tie_weights()

    @property
    def embedding_weight(self) -> nn.Parameter:
        """The embedding's, under what is wrapped around it."""
        return getattr(self.model.embed_tokens, "base_layer", self.model.embed_tokens).get_parameter("weight")

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's Parameter where the config ties them (again, after a replacement)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding_weight

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
            return self.lm_head(hidden_BSD)
        if isinstance(self.lm_head, Head):
            return self.lm_head(hidden_BSD, targets_BS, per_token=per_token)
        # A head that was replaced (by LoRA, say) maps x to y and no more: the loss has to come from its logits.
        logits_BSV = self.lm_head(hidden_BSD)
        logits_TV, targets_T = logits_BSV.flatten(0, 1).float(), targets_BS.flatten()
        if per_token:
            losses_T = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="none")
            return -losses_T.view(targets_BS.shape)
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
