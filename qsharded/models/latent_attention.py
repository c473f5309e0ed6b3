"""Multi-head latent attention, under the module names of Hugging Face's checkpoints: DeepSeek-V2's and later ones'.

A token's keys and values, of all heads, are one projection of a narrow latent vector; beside it stands one rotated key
that all heads share. These two are what a cache holds. Source: "DeepSeek-V2", arXiv:2405.04434, section 2.1.

Axes: B batch, S sequence, T keys (S, and before them the cache's), D hidden size, C width of the latent vector,
H heads, N and R dims of a head of q and k that are not rotated and that are, E = N + R, V dims of a head of v.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.attention import attend
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.config import ModelConfig
from qsharded.models.kv_cache import KVCache
from qsharded.models.norm import rms_norm
from qsharded.models.rope import rotate

_LATENT_EPS = 1e-6
"""Of the latent vectors' norms, whatever rms_norm_eps is: transformers and DeepSeek's own code pass none on."""


class LatentAttention(nn.Module):
    """Causal self-attention whose keys and values are unpacked from a latent vector a token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.latent is not None
        self.layer, self.heads, self.interleaved = layer, config.num_attention_heads, config.rope_interleaved
        self.shape = latent = config.latent
        D, H = config.hidden_size, self.heads
        self._make_queries(config)
        self.kv_a_proj_with_mqa = nn.Linear(D, latent.kv_rank + latent.rope_dim, bias=config.qkv_bias)
        self.kv_a_layernorm = rms_norm(config, latent.kv_rank, _LATENT_EPS)
        self.kv_b_proj = nn.Linear(latent.kv_rank, H * (latent.content_dim + latent.value_dim), bias=False)
        self.o_proj = nn.Linear(H * latent.value_dim, D, bias=config.o_bias)

    def _make_queries(self, config: ModelConfig) -> None:
        rank, width = self.shape.query_rank, self.heads * self.shape.head_dim
        if rank is None:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
            return
        self.q_a_proj = nn.Linear(config.hidden_size, rank, bias=config.qkv_bias)
        self.q_a_layernorm = rms_norm(config, rank, _LATENT_EPS)
        self.q_b_proj = nn.Linear(rank, width, bias=False)

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        q_BSHE, latent_BTC, key_BTR = self._queries(x_BSD, inputs), *self._latents(x_BSD, inputs)
        if cache is not None:
            kept = cache.update(self.layer, latent_BTC.unsqueeze(1), key_BTR.unsqueeze(1))
            latent_BTC, key_BTR = (of_one_head.squeeze(1) for of_one_head in kept)
        if cache is not None and self._is_dear_to_unpack(q_BSHE, latent_BTC):
            out_BSHV = self._attend_to_latents(q_BSHE, latent_BTC, key_BTR, inputs)
        else:
            out_BSHV = _attend_in_one_width(q_BSHE, *self._unpacked(latent_BTC, key_BTR), inputs)
        return self.o_proj(out_BSHV.flatten(2))

    def _queries(self, x_BSD: Tensor, inputs: AttentionInputs) -> Tensor:
        if self.shape.query_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q_BSHE = q.unflatten(-1, (self.heads, self.shape.head_dim))
        content, rotary = q_BSHE.split([self.shape.content_dim, self.shape.rope_dim], dim=-1)
        return torch.cat((content, self._rotated(rotary, inputs)), dim=-1)

    def _latents(self, x_BSD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """[B, S, C], and the key that all heads share, [B, S, R]."""
        latent_BSC, key_BSR = self.kv_a_proj_with_mqa(x_BSD).split([self.shape.kv_rank, self.shape.rope_dim], dim=-1)
        return self.kv_a_layernorm(latent_BSC), self._rotated(key_BSR.unsqueeze(2), inputs).squeeze(2)

    def _rotated(self, x_BSHR: Tensor, inputs: AttentionInputs) -> Tensor:
        x_BHSR = x_BSHR.transpose(1, 2)
        return rotate(x_BHSR, inputs.cos_BSR, inputs.sin_BSR, interleaved=self.interleaved).transpose(1, 2)

    def _unpacked(self, latent_BTC: Tensor, key_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, T, H, E] and v [B, T, H, V]."""
        content_BTHN, v_BTHV = self._heads(self.kv_b_proj(latent_BTC))
        key_BTHR = key_BTR.unsqueeze(2).expand(-1, -1, self.heads, -1)
        return torch.cat((content_BTHN, key_BTHR), dim=-1), v_BTHV

    def _heads(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.shape.content_dim, self.shape.value_dim]
        content, v = kv.unflatten(-1, (self.heads, sum(parts))).split(parts, dim=-1)
        return content, v

    def _is_dear_to_unpack(self, q_BSHE: Tensor, latent_BTC: Tensor) -> bool:
        """Where one token is generated: the keys before it are more than the projection's own C columns."""
        B, T, C = latent_BTC.shape
        return q_BSHE.shape[1] == 1 and B * T > C and not torch.is_grad_enabled()

    def _attend_to_latents(
        self, q_B1HE: Tensor, latent_BTC: Tensor, key_BTR: Tensor, inputs: AttentionInputs
    ) -> Tensor:
        """The same, with the projection on the side of the one query: the latent vectors are keys and values of a
        single head. Its matrix is what it makes of the unit vectors, an adapter's part included."""
        C = self.shape.kv_rank
        units_CC = torch.eye(C, dtype=latent_BTC.dtype, device=latent_BTC.device)
        to_keys_CHN, to_values_CHV = self._heads(self.kv_b_proj(units_CC))
        content, rotary = q_B1HE.split([self.shape.content_dim, self.shape.rope_dim], dim=-1)
        q_B1HC = torch.einsum("bshn,chn->bshc", content, to_keys_CHN)
        q, k = torch.cat((q_B1HC, rotary), dim=-1), torch.cat((latent_BTC, key_BTR), dim=-1)
        out_B1HC = attend(q, k.unsqueeze(2), latent_BTC.unsqueeze(2), inputs)
        return torch.einsum("bshc,chv->bshv", out_B1HC, to_values_CHV)


def _attend_in_one_width(q_BSHE: Tensor, k_BTHE: Tensor, v_BTHV: Tensor, inputs: AttentionInputs) -> Tensor:
    """[B, S, H, V]. Fused kernels want heads of one width: the narrower are filled up with zeros, which add nothing to
    scores, and columns of zeros to the output. The scale of ``inputs`` is that of E dims."""
    V, width = v_BTHV.shape[-1], max(q_BSHE.shape[-1], v_BTHV.shape[-1])
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_BSHE, k_BTHE, v_BTHV))
    return attend(q, k, v, inputs)[..., :V]
