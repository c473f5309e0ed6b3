"""Self-attention of a decoder layer, under the module names of Hugging Face's checkpoints.

Axes: B batch, S sequence, T keys (S, and before them the cache's), D hidden size, H query heads, G key-value heads,
E head dim.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qsharded.models.attention import attend
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.config import ModelConfig
from qsharded.models.kv_cache import KVCache
from qsharded.models.latent_attention import LatentAttention
from qsharded.models.norm import rms_norm
from qsharded.models.rope import rotate


def self_attention(config: ModelConfig, layer: int) -> "Attention | LatentAttention":
    """The attention that ``config`` describes."""
    if config.latent is not None:
        return LatentAttention(config, layer)
    if config.attention_gate:
        return GatedAttention(config, layer)
    if config.sinks:
        return SinkAttention(config, layer)
    if config.fused_qkv:
        return FusedQKVAttention(config, layer)
    return _BY_NORM[config.qk_norm_place](config, layer)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped key-value heads and, where a family has them, norms of each
    head of q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim, self.heads, self.kv_heads = (
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.interleaved = config.rope_interleaved
        self._make_projections(config)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self._make_norms(config)

    def _make_projections(self, config: ModelConfig) -> None:
        query_dim, key_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=config.qkv_bias)

    def _make_norms(self, config: ModelConfig) -> None:
        self.q_norm = rms_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = rms_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def input_projections(self) -> tuple[nn.Module, ...]:
        """The layers that read the attention's input; side by side their outputs are q, k and v."""
        return self.q_proj, self.k_proj, self.v_proj

    def inputs_of(self, inputs: AttentionInputs) -> AttentionInputs:
        """What this layer attends with, of the inputs that layers share."""
        return inputs

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        return self.o_proj(self.attend(*self.project(x_BSD), self.inputs_of(inputs), cache).flatten(2))

    def attend(
        self, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, inputs: AttentionInputs, cache: KVCache | None
    ) -> Tensor:
        """The output [B, S, H, E] of what the projections put out."""
        q_BHSE, k_BGTE = self.turn(q_BSHE, inputs), self.turn(k_BSGE, inputs, is_key=True)
        if inputs.query_scale_BS is not None:
            q_BHSE = q_BHSE * inputs.query_scale_BS[:, None, :, None]
        v_BGTE = v_BSGE.transpose(1, 2)
        if cache is not None:
            k_BGTE, v_BGTE = cache.update(self.layer, k_BGTE, v_BGTE)
        return attend(q_BHSE.transpose(1, 2), k_BGTE.transpose(1, 2), v_BGTE.transpose(1, 2), inputs)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H, E], k and v [B, S, G, E] as the projections put them out."""
        return self._heads(self.q_proj(x_BSD)), self._heads(self.k_proj(x_BSD)), self._heads(self.v_proj(x_BSD))

    def turn(self, x_BSHE: Tensor, inputs: AttentionInputs, *, is_key: bool = False) -> Tensor:
        """q or k, normalised and rotated, [B, H, S, E]."""
        return self._rotated((self.k_norm if is_key else self.q_norm)(x_BSHE), inputs)

    def _rotated(self, x_BSHE: Tensor, inputs: AttentionInputs) -> Tensor:
        return rotate(x_BSHE.transpose(1, 2), inputs.cos_BSR, inputs.sin_BSR, interleaved=self.interleaved)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class GatedAttention(Attention):
    """q_proj puts out q and a gate, head by head; the sigmoid of the gate multiplies the output: Qwen3.5's."""

    def _make_projections(self, config: ModelConfig) -> None:
        super()._make_projections(config)
        self.q_proj = nn.Linear(config.hidden_size, 2 * self.heads * self.head_dim, bias=config.qkv_bias)

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        q_BSHE, gate_BSHE = self.q_proj(x_BSD).unflatten(-1, (self.heads, 2, self.head_dim)).unbind(3)
        k_BSGE, v_BSGE = self._heads(self.k_proj(x_BSD)), self._heads(self.v_proj(x_BSD))
        y_BSHE = self.attend(q_BSHE, k_BSGE, v_BSGE, inputs, cache)
        return self.o_proj((y_BSHE * gate_BSHE.sigmoid()).flatten(2))


class SinkAttention(Attention):
    """Each head's softmax has one more score, of no key: gpt-oss's."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.sinks = nn.Parameter(torch.zeros(self.heads))

    def inputs_of(self, inputs: AttentionInputs) -> AttentionInputs:
        """With this layer's sinks."""
        return replace(inputs, sinks_H=self.sinks)


class FusedQKVAttention(Attention):
    """q, k and v from one linear layer, ``qkv_proj``: Phi-3's."""

    def _make_projections(self, config: ModelConfig) -> None:
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)

    def input_projections(self) -> tuple[nn.Module, ...]:
        """``qkv_proj`` alone."""
        return (self.qkv_proj,)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`Attention`, parts of one output."""
        return self._heads(self.qkv_proj(x_BSD)).split([self.heads, self.kv_heads, self.kv_heads], dim=2)


class WidthNormAttention(Attention):
    """One norm over all heads of q together, and one over those of k: OLMo 2's."""

    def _make_norms(self, config: ModelConfig) -> None:
        self.q_norm = rms_norm(config, self.heads * self.head_dim)
        self.k_norm = rms_norm(config, self.kv_heads * self.head_dim)

    def turn(self, x_BSHE: Tensor, inputs: AttentionInputs, *, is_key: bool = False) -> Tensor:
        """As in :class:`Attention`."""
        norm = self.k_norm if is_key else self.q_norm
        return self._rotated(self._heads(norm(x_BSHE.flatten(2))), inputs)


class LateNormAttention(Attention):
    """Norms of each head once it is rotated: Hunyuan's."""

    def _make_norms(self, config: ModelConfig) -> None:
        self.query_layernorm = rms_norm(config, self.head_dim)
        self.key_layernorm = rms_norm(config, self.head_dim)

    def turn(self, x_BSHE: Tensor, inputs: AttentionInputs, *, is_key: bool = False) -> Tensor:
        """As in :class:`Attention`, in the other order."""
        return (self.key_layernorm if is_key else self.query_layernorm)(self._rotated(x_BSHE, inputs))


_BY_NORM = {"head": Attention, "width": WidthNormAttention, "rotated head": LateNormAttention}
