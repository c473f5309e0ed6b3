"""The decoder of Llama, Mistral, Qwen2, Qwen3 and SmolLM2, under the module names of their checkpoints.

Read from top to bottom: attention, MLP, layer, stack, head, model. Nothing here knows of sharding, quantization or
adapters: those replace modules from outside, and any Linear may become another module that maps x to y.

Axes: B batch, S sequence, T keys (S, and before them the cache's), D hidden size, H query heads, G key-value heads,
E head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.attention_inputs import attention_mask
from qsharded.models.chunked_loss import IGNORE, chunked_cross_entropy
from qsharded.models.config import ModelConfig
from qsharded.models.kv_cache import KVCache
from qsharded.models.rope import rope_tables, rotate


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

    def forward(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, mask_BST: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        q_BHSE = rotate(self.q_norm(self._heads(self.q_proj(x_BSD))).transpose(1, 2), cos_BSE, sin_BSE)
        k_BGTE = rotate(self.k_norm(self._heads(self.k_proj(x_BSD))).transpose(1, 2), cos_BSE, sin_BSE)
        v_BGTE = self._heads(self.v_proj(x_BSD)).transpose(1, 2)
        if cache is not None:
            k_BGTE, v_BGTE = cache.update(self.layer, k_BGTE, v_BGTE)
        y_BHSE = attend(q_BHSE, k_BGTE, v_BGTE, mask_BST)
        return self.o_proj(y_BHSE.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def attend(q_BHSE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask_BST: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, each key-value head serving H / G query heads.

    No mask: causal among as many keys as queries, or one query that sees all keys.
    """
    groups = q_BHSE.shape[1] // k_BGTE.shape[1]
    if mask_BST is None:
        causal = q_BHSE.shape[2] > 1
        return F.scaled_dot_product_attention(q_BHSE, k_BGTE, v_BGTE, is_causal=causal, enable_gqa=groups > 1)
    # Of the fused GPU kernels only cuDNN's takes a mask and grouped heads at once, and it is not everywhere; the
    # fallback would hold all S x T scores. Repeating costs 5% where cuDNN would have served (H200, 4 x 2048 tokens).
    if groups > 1:
        k_BGTE, v_BGTE = (t.repeat_interleave(groups, dim=1) for t in (k_BGTE, v_BGTE))
    return F.scaled_dot_product_attention(q_BHSE, k_BGTE, v_BGTE, attn_mask=mask_BST)


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

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        mask_BST: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One layer. `mask_BST` is boolean, broadcastable to `[B, H, S, T]`; None: as in `attend`."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_BSE, sin_BSE, mask_BST, cache)
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
        self, input_ids_BS: Tensor, positions_BS: Tensor | None, documents_BS: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        length = input_ids_BS.shape[1]
        past = 0 if cache is None else cache.length
        self._check_length(past + length)
        documents_BT = documents_BS if cache is None else cache.reserve(length, documents_BS)
        if positions_BS is None:
            positions_BS = torch.arange(past, past + length, device=input_ids_BS.device)[None]

        x_BSD = self.embed_tokens(input_ids_BS).to(self.dtype)  # an embedding that is trained may be wider
        cos_BSE, sin_BSE = rope_tables(self.config.rope, self.config.head_dim, positions_BS, x_BSD.dtype)
        # Neither tables nor masks depend on the layer, but for its window: one mask serves all layers of a window.
        masks = {
            window: attention_mask(length, past + length, documents_BT, window, x_BSD.device)
            for window in set(self.config.layer_windows)
        }
        for layer, window in zip(self.layers, self.config.layer_windows, strict=True):
            x_BSD = layer(x_BSD, cos_BSE, sin_BSE, masks[window], cache)
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
    """Hidden states to logits or, given targets, straight to the loss.

    The loss lives in this forward so that whatever gathers the weight around a module's call (FSDP) does so once.
    """

    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        weight_VD = self.weight.to(hidden_BSD.dtype)  # a head that is trained in full has a wider master
        if targets_BS is None:
            return F.linear(hidden_BSD, weight_VD)
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
        targets_BS: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits `[B, S, V]`, or the fp32 sum of the token losses where `targets_BS` is given.

        positions_BS: each token's place in its document, from 0; None counts from the row's (or cache's) start.
        document_ids_BS: int64; tokens see earlier tokens of equal id only; -1 marks padding. None: a row is a document.
        targets_BS: int64, already shifted: what position s predicts stands at s; -100 is not supervised.
        cache: tokens read before these, extended by these. last_only: logits `[B, 1, V]` of the last position.

        Raises ValueError where the cache is full, or a row longer than a "dynamic" rope supports.
        """
        hidden_BSD = self.model(input_ids_BS, positions_BS, document_ids_BS, cache)
        if last_only:
            hidden_BSD = hidden_BSD[:, -1:]
        if targets_BS is None:
            return self.lm_head(hidden_BSD)
        if isinstance(self.lm_head, Head):
            return self.lm_head(hidden_BSD, targets_BS)
        # A head that was replaced (by LoRA, say) maps x to y and no more: the loss has to come from its logits.
        logits_BSV = self.lm_head(hidden_BSD)
        return F.cross_entropy(
            logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum"
        )
