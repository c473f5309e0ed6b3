"""A decoder layer on one more token a row, without gradients: its projections as they are, few launches between them.

Plain, a layer launches some 25 kernels a token, of which 7 are products. Here norms take the residual addition with
them, q and k are turned by one kernel, and gate and up meet in one.

Axes: B rows, one token each, D hidden size, J intermediate size, H query heads, G key-value heads, E head dim.
"""

import torch
from torch import Tensor

from qsharded.fused.attention_half import norm_factor, rotary_of
from qsharded.fused.layer import beyond_fused
from qsharded.fused.norm_rotary_swiglu import rms_norm, swiglu
from qsharded.models.attention import attend
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.decoder import DecoderLayer
from qsharded.models.kv_cache import KVCache
from qsharded.models.mixture import MixtureMLP


def takes(layer: DecoderLayer, x_BSD: Tensor, inputs: AttentionInputs) -> bool:
    """Whether :func:`forward` computes what ``layer`` does with these: one token a row, and Llama's kind of layer."""
    one_token = x_BSD.shape[1] == 1 and not torch.is_grad_enabled() and inputs.query_scale_BS is None
    return one_token and beyond_fused(layer.config) is None


def forward(layer: DecoderLayer, x_B1D: Tensor, inputs: AttentionInputs, cache: KVCache) -> Tensor:
    """What ``layer`` computes, [B, 1, D], with the earlier tokens' keys and values in ``cache``."""
    norms, eps, x_BD = layer.config.norms, layer.config.rms_norm_eps, x_B1D[:, 0]
    y_BD, _ = _normed(layer, norms.before_attention, x_BD, None)
    added_BD = _behind(layer, norms.after_attention, _attended(layer, y_BD, inputs, cache), eps)
    y_BD, h_BD = _normed(layer, norms.before_mlp, added_BD, x_BD)
    return (h_BD + _behind(layer, norms.after_mlp, _mlp(layer, y_BD, inputs), eps))[:, None]


def _normed(layer: DecoderLayer, name: str | None, x_BD: Tensor, residual_BD: Tensor | None) -> tuple[Tensor, Tensor]:
    """(The norm of this name, if there is one, of x + residual; x + residual.)"""
    weight = norm_factor(layer, name)
    if weight is None:
        h_BD = x_BD if residual_BD is None else residual_BD + x_BD
        return h_BD, h_BD
    y_BD, _, h_BD = rms_norm(x_BD.contiguous(), weight, layer.config.rms_norm_eps, residual_BD)
    return y_BD, h_BD


def _behind(layer: DecoderLayer, name: str | None, y_BD: Tensor, eps: float) -> Tensor:
    """What an output adds to the residual stream."""
    multiplier = layer.config.residual_multiplier
    weight = norm_factor(layer, name, multiplier)
    if weight is not None:
        return rms_norm(y_BD, weight, eps)[0]
    return y_BD if multiplier == 1 else y_BD * multiplier


def _attended(layer: DecoderLayer, y_BD: Tensor, inputs: AttentionInputs, cache: KVCache) -> Tensor:
    attention = layer.self_attn
    qkv = _side_by_side([projection(y_BD) for projection in attention.input_projections()])
    rotary = rotary_of(layer, torch.Size((len(y_BD), 1)), inputs)
    rotary.turn_(qkv)
    q_B1HE, k_B1GE, v_B1GE = (heads.unsqueeze(1) for heads in rotary.q_k_v(qkv))
    k_BGTE, v_BGTE = cache.update(attention.layer, k_B1GE.transpose(1, 2), v_B1GE.transpose(1, 2))
    out_B1HE = attend(q_B1HE, k_BGTE.transpose(1, 2), v_BGTE.transpose(1, 2), attention.inputs_of(inputs))
    attended_BD: Tensor = attention.o_proj(out_B1HE.flatten(1))
    return attended_BD


def _mlp(layer: DecoderLayer, y_BD: Tensor, inputs: AttentionInputs) -> Tensor:
    mlp = layer.mlp
    if isinstance(mlp, MixtureMLP):
        return mlp(y_BD[:, None], inputs.is_routed_BS)[:, 0]
    gate_up = _side_by_side([projection(y_BD) for projection in mlp.input_projections()])
    act_BJ = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    down_BD: Tensor = mlp.down_proj(swiglu(gate_up, act_BJ, layer.config.activation))
    return down_BD


def _side_by_side(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
