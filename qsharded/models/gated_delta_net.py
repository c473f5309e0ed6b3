"""Gated delta-net layers, in place of attention in three of four layers of Qwen3-Next and Qwen3.5: in plain PyTorch,
for any device, and by flash-linear-attention's kernel where that is installed.

A state S [Ek, Ev] a head is read and rewritten by each token, and so stands for all keys and values before it:

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t^T S_{t-1})^T,  o_t = S_t^T q_t

with a_t = exp(g_t) how much is kept, and b_t how much is corrected. Before it q, k and v pass a short causal
convolution. Both begin anew where a document does. A chunk of tokens is computed at once, as a triangular system.

Axes: B batch, S sequence, C tokens of a chunk, D hidden size, H value heads, G key heads, Ek, Ev their dims, K taps of
the convolution, W channels of it (q's, k's and v's).
Source: Yang et al., "Gated Delta Networks", arXiv:2412.06464; the chunks: arXiv:2406.06484.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.config import ModelConfig
from qsharded.models.fla import fla_rule, run_rule
from qsharded.models.kv_cache import KVCache
from qsharded.models.layer_shapes import LinearAttention

_CHUNK = 64


class GatedDeltaNet(nn.Module):
    """Under the module names of Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        linear = config.linear
        assert linear is not None
        self.layer, self.key_dim, self.value_dim = layer, linear.key_dim, linear.value_dim
        keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
        self.widths = [keys, keys, values]
        self._make_projections(config.hidden_size, linear)
        self.conv1d = nn.Conv1d(sum(self.widths), sum(self.widths), linear.taps, groups=sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.ones(linear.value_heads))
        self.A_log = nn.Parameter(torch.zeros(linear.value_heads))
        self.norm = nn.RMSNorm(linear.value_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def _make_projections(self, hidden_size: int, linear: LinearAttention) -> None:
        self.in_proj_qkv = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.in_proj_z = nn.Linear(hidden_size, self.widths[2], bias=False)
        self.in_proj_b = nn.Linear(hidden_size, linear.value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden_size, linear.value_heads, bias=False)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v side by side [B, S, W]; the output's gate [B, S, H Ev]; what makes b and a, [B, S, H] each."""
        return self.in_proj_qkv(x_BSD), self.in_proj_z(x_BSD), self.in_proj_b(x_BSD), self.in_proj_a(x_BSD)

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        qkv_BSW, z, b_BSH, a_BSH = self.project(x_BSD)
        taps_before, state = (None, None) if cache is None else cache.state(self.layer)
        documents = Documents.of(inputs.documents_BT, x_BSD.shape[1])
        mixed_BSW, taps_before = causal_conv(qkv_BSW, self.conv1d.weight, documents, taps_before)
        q, k, v = F.silu(mixed_BSW).split(self.widths, dim=-1)
        q_BSHE, k_BSHE, v_BSHE = (
            self._heads(q, self.key_dim),
            self._heads(k, self.key_dim),
            self._heads(v, self.value_dim),
        )
        beta_BSH = b_BSH.sigmoid()
        keeps = F.softplus(a_BSH.float() + self.dt_bias.float())
        log_kept_BSH = -self.A_log.float().exp() * keeps
        rule = fla_rule(x_BSD) if cache is None else None
        given = q_BSHE, k_BSHE, v_BSHE, log_kept_BSH, beta_BSH
        if rule is not None and (inputs.documents_BT is None or inputs.boundaries is not None):
            out_BSHE = run_rule(rule, *given, inputs.boundaries)
        else:
            out_BSHE, state = gated_delta_rule(*given, documents, state)
            if cache is not None:
                cache.set_state(self.layer, (taps_before, state))
        gate_BSHE = self._heads(z, self.value_dim)
        gated_BSHE = (self.norm(out_BSHE).float() * F.silu(gate_BSHE.float())).to(x_BSD.dtype)
        return self.out_proj(gated_BSHE.flatten(2))

    @staticmethod
    def _heads(x: Tensor, dim: int) -> Tensor:
        return x.unflatten(-1, (-1, dim))


class FusedDeltaNet(GatedDeltaNet):
    """q, k, v and the gate from one linear layer, b and a from another, each key head's part of all behind the last's:
    Qwen3-Next's."""

    def _make_projections(self, hidden_size: int, linear: LinearAttention) -> None:
        of_a_head = linear.value_heads // linear.key_heads
        self.key_heads, self.value_heads_each = linear.key_heads, of_a_head
        width = sum(self.widths) + self.widths[2]
        self.in_proj_qkvz = nn.Linear(hidden_size, width, bias=False)
        self.in_proj_ba = nn.Linear(hidden_size, 2 * linear.value_heads, bias=False)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in :class:`GatedDeltaNet`."""
        value_width = self.value_heads_each * self.value_dim
        by_head = self.in_proj_qkvz(x_BSD).unflatten(-1, (self.key_heads, -1))
        q, k, v, z = (part.flatten(2) for part in by_head.split([self.key_dim] * 2 + [value_width] * 2, dim=-1))
        b, a = (part.flatten(2) for part in self.in_proj_ba(x_BSD).unflatten(-1, (self.key_heads, -1)).chunk(2, dim=-1))
        return torch.cat((q, k, v), dim=-1), z, b, a


class Documents:
    """Of which document each token is, and those before it in a cache; all are of one where nothing is known."""

    def __init__(self, ids_BT: Tensor | None, past: int) -> None:
        self._ids_BT, self._past = ids_BT, past

    @classmethod
    def of(cls, ids_BT: Tensor | None, tokens: int) -> "Documents":
        """Of the last ``tokens`` of T."""
        return cls(ids_BT, 0 if ids_BT is None else ids_BT.shape[1] - tokens)

    def same(self, of: slice, others: slice) -> Tensor | None:
        """[B, of, others]: whether two tokens are of one document; None: all are. Tokens count from the first new
        one; those before the first of all are of no document."""
        if self._ids_BT is None:
            return None
        return self._at(of)[:, :, None] == self._at(others)[:, None, :]

    def _at(self, tokens: slice) -> Tensor:
        assert self._ids_BT is not None
        first, stop = tokens.start + self._past, tokens.stop + self._past
        known = self._ids_BT[:, max(first, 0) : max(stop, 0)]
        return F.pad(known, (stop - first - known.shape[1], 0), value=_NONE)


_NONE = -2  # no document's id


def causal_conv(
    x_BSW: Tensor, weight_W1K: Tensor, documents: Documents, before_BKW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel's convolution over the last K tokens of a token's document; and the last K - 1 inputs, for more.

    Args:
        before_BKW: those of the tokens before, [B, K - 1, W].
    """
    (B, S, W), K = x_BSW.shape, weight_W1K.shape[-1]
    before_BKW = x_BSW.new_zeros(B, K - 1, W) if before_BKW is None else before_BKW
    all_BTW = torch.cat((before_BKW, x_BSW), dim=1)
    out_BSW = torch.zeros_like(x_BSW)
    for lag in range(K):
        taken = all_BTW[:, K - 1 - lag : K - 1 - lag + S]
        same = documents.same(slice(0, S), slice(-lag, S - lag))
        if same is not None:
            taken = taken * same.diagonal(dim1=1, dim2=2)[..., None]
        out_BSW = out_BSW + taken * weight_W1K[:, 0, K - 1 - lag]
    return out_BSW, all_BTW[:, S:]


def gated_delta_rule(
    q_BSGE: Tensor,
    k_BSGE: Tensor,
    v_BSHE: Tensor,
    log_kept_BSH: Tensor,
    beta_BSH: Tensor,
    documents: Documents,
    state_BHEE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(the output [B, S, H, Ev] in q's dtype, the state [B, H, Ek, Ev] behind the last token), in fp32 at least.

    q and k are normalised to length 1; each of their heads serves H / G heads in a row.
    """
    precise = torch.promote_types(q_BSGE.dtype, torch.float32)
    groups = v_BSHE.shape[2] // k_BSGE.shape[2]
    q, k = (_unit(t.to(precise)).repeat_interleave(groups, dim=2).transpose(1, 2) for t in (q_BSGE, k_BSGE))
    v, beta = v_BSHE.to(precise).transpose(1, 2), beta_BSH.to(precise).transpose(1, 2)
    log_kept = log_kept_BSH.to(precise).transpose(1, 2)
    (B, H, S, E), outputs = q.shape, []
    state = q.new_zeros(B, H, E, v.shape[-1]) if state_BHEE is None else state_BHEE
    for start in range(0, S, _CHUNK):
        rows = slice(start, min(start + _CHUNK, S))
        chunk = (q[:, :, rows] * E**-0.5, k[:, :, rows], v[:, :, rows], log_kept[:, :, rows], beta[:, :, rows])
        out, state = _chunk(*chunk, state, _Seen.of(documents, rows, q.device))
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(q_BSGE.dtype), state


class _Seen:
    """Within a chunk: whether token i sees token j [.., C, C], and which tokens are of the document before it and of
    that of its last token [.., C, 1]; and whether these two are one [.., 1, 1]."""

    def __init__(self, pairs: Tensor, before: Tensor, of_last: Tensor, goes_on: Tensor) -> None:
        self.pairs, self.before, self.of_last, self.goes_on = pairs, before, of_last, goes_on

    @classmethod
    def of(cls, documents: Documents, rows: slice, device: torch.device) -> "_Seen":
        C = rows.stop - rows.start
        causal = torch.ones(C, C, dtype=torch.bool, device=device).tril()
        same = documents.same(rows, slice(rows.start - 1, rows.stop))
        if same is None:
            one = torch.ones(1, 1, dtype=torch.bool, device=device)
            return cls(causal, one, one, one)
        same = same[:, None]
        return cls(same[..., 1:] & causal, same[..., :1], same[..., -1:], same[..., -1:, :1])


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, log_kept: Tensor, beta: Tensor, state: Tensor, seen: _Seen
) -> tuple[Tensor, Tensor]:
    """A chunk's output [B, H, C, Ev] and the state behind it. What each token writes depends on what those before it
    wrote: (I + tril(b k k^T decay)) u = b (v - what k reads of the state)."""
    since_start = log_kept.cumsum(dim=-1)[..., None]
    between = (since_start - since_start.mT).masked_fill(~seen.pairs, -torch.inf).exp()
    from_start = since_start.exp() * seen.before
    written = torch.linalg.solve_triangular(
        beta[..., None] * (k @ k.mT) * between,
        beta[..., None] * (v - from_start * (k @ state)),
        upper=False,
        unitriangular=True,
    )
    out = from_start * (q @ state) + ((q @ k.mT) * between) @ written
    to_end = (since_start[..., -1:, :] - since_start).exp() * seen.of_last
    kept = since_start[..., -1:, :].exp() * seen.goes_on
    return out, kept * state + (k * to_end).mT @ written


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
