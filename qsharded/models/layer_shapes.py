"""The shapes of layers that not every decoder has: gated delta-nets, latent attention, mixtures of experts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearAttention:
    """The shape of gated delta-net layers: heads and their dims, the taps of the convolution before them, and whether
    their projections are fused (``in_proj_qkvz`` and ``in_proj_ba``)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    fused: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """The shape of multi-head latent attention (DeepSeek-V2's, arXiv:2405.04434): keys and values of all heads come
    from one narrow vector a token, and queries may, too.

    Attributes:
        query_rank, kv_rank: widths of these latent vectors; ``query_rank`` None: q comes from one projection.
        content_dim, rope_dim: of a head of q and k; the second part, behind the first, is rotated, and all heads share
            one such key.
        value_dim: of a head of v and of the output.
    """

    query_rank: int | None
    kv_rank: int
    content_dim: int
    rope_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Of q and k."""
        return self.content_dim + self.rope_dim


@dataclass(frozen=True)
class ExpertMixture:
    """The MLP of sparse layers: experts, of which a router chooses some for each token.

    Attributes:
        experts, per_token: how many there are, and how many a token gets.
        intermediate_size: of one expert.
        router: how a token's experts are chosen and weighted: "softmax" over all experts, "softmax of chosen" logits
            (gpt-oss's), "softmax of groups" (DeepSeek-V2's), or "sigmoid" (DeepSeek-V3's and GLM's: a correction bias
            counts in the choice alone).
        normalised: weights of a token's experts are divided by their sum.
        scaling: of the weights.
        groups, chosen_groups: with the last two a token's experts come from so many of the groups.
        shared_size: intermediate size of the expert that every token gets beside; 0: there is none.
        shared_name, shared_gate: what it is called, and whether a gate weighs it.
        clamped: gate and up are clamped to +-7, and meet as gpt-oss's do; experts and router have biases.
    """

    experts: int
    per_token: int
    intermediate_size: int
    router: Literal["softmax", "softmax of chosen", "softmax of groups", "sigmoid"] = "softmax"
    normalised: bool = True
    scaling: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    shared_size: int = 0
    shared_name: str = "shared_experts"
    shared_gate: bool = False
    clamped: bool = False
    clamp_limit: float = 7.0
    clamp_gain: float = 1.702

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.experts:
            raise ValueError(f"num_experts_per_tok must be from 1 to the {self.experts} experts, got {self.per_token}")
        if self.experts % self.groups or not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(
                f"n_group ({self.groups}) must divide the {self.experts} experts, and topk_group "
                f"({self.chosen_groups}) be one of them at least"
            )
        to_choose_from = self.experts // self.groups * self.chosen_groups
        if to_choose_from < self.per_token or (self.chosen_groups < self.groups > self.experts // 2):
            raise ValueError(
                f"n_group ({self.groups}) and topk_group ({self.chosen_groups}) leave {to_choose_from} of "
                f"{self.experts} experts, of which num_experts_per_tok ({self.per_token}) are chosen, in groups of 2 "
                "and more"
            )
