"""What a checkpoint's config.json says about its decoder, read strictly: a key we do not know stops the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from qsharded.models.config_schema import check_model_config
from qsharded.models.layer_shapes import ExpertMixture, LatentAttention, LinearAttention
from qsharded.models.parts import PartNames
from qsharded.models.rope import RopeConfig
from qsharded.utils.untrusted_json import named


@dataclass(frozen=True)
class NormNames:
    """What a layer's norms are called, around attention and around the MLP; None: there is none at this place."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def names(self) -> tuple[str, ...]:
        """Those that are there."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


PRE_NORMS = NormNames()
POST_NORMS = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
"""OLMo 2's and EXAONE 4's."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and mathematics, under Hugging Face's names where these exist. The defaults are Llama's.

    Attributes:
        qk_norm: q and k are normalised; ``qk_norm_place`` says where: each head, all heads together, or each head once
            it is rotated.
        fused_qkv: q, k and v are one linear layer, ``qkv_proj``.
        mlp: "gated" down(act(gate) up), "fused" the same with gate and up in one layer, "ungated" down(act(up)).
        norms: of a layer.
        norm_offset: norms multiply by 1 + weight.
        layer_windows: per layer, how many latest tokens (itself included) a token sees; None: all.
        layer_ropes: per layer its rotary embedding; None: none. Empty: ``rope``, in every layer.
        rope_interleaved: rotary embedding pairs neighbours, not halves.
        attention_scale: of the scores; None: 1 / sqrt(head_dim).
        query_scale_beta, query_scale_length: q is multiplied by 1 + beta log(1 + floor(position / length)).
        score_softcap, logit_softcap: c of c tanh(x / c), on attention's scores and on the logits.
        embedding_multiplier, residual_multiplier, logit_multiplier: of the embedding's output, of what a layer adds
            to the residual stream, and of the logits.
        embedding_multiplier_rounded: the first is rounded to the activations' dtype.
        attention_gate: q_proj puts out q and a gate, by whose sigmoid attention's output is multiplied.
        latent: of latent attention, in every layer; ``head_dim`` is then q's and k's.
        linear, linear_layers: gated delta-net layers, and which layers are such in attention's place.
        mixture, sparse_layers: mixtures of experts, and which layers have one in place of the MLP; empty: all.
        sinks: each head attends to a sink as well, a score without a value.
        further_layers: how many layers behind these predict further tokens, and are passed over in a checkpoint.
        wrapper: model_type of the multimodal model of which this is the text part, or "".
    """

    parts: ClassVar[PartNames] = PartNames()

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_windows: tuple[int | None, ...] = ()
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    rope_interleaved: bool = False
    qk_norm_place: Literal["head", "width", "rotated head"] = "head"
    fused_qkv: bool = False
    mlp: Literal["gated", "fused", "ungated"] = "gated"
    activation: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    norms: NormNames = PRE_NORMS
    norm_offset: bool = False
    attention_scale: float | None = None
    query_scale_beta: float = 0.0
    query_scale_length: int = 0
    score_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    attention_gate: bool = False
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    linear_layers: tuple[bool, ...] = ()
    mixture: ExpertMixture | None = None
    sparse_layers: tuple[bool, ...] = ()
    sinks: bool = False
    further_layers: int = 0
    wrapper: str = ""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope_head_dim % 2:
            name = "head_dim" if self.latent is None else "qk_rope_head_dim"
            raise ValueError(f"{name} must be even for rotary embedding, got {self.rope_head_dim}")
        if self.rope.rotary_dim(self.rope_head_dim) % 2:
            raise ValueError(f"rotary embedding must turn an even number of dims, not {self.rope.rotary_fraction} of "
                             f"head_dim {self.rope_head_dim}")  # fmt: skip
        for rope in {self.rope, *filter(None, self.layer_ropes)}:
            rope.check(self.rope_head_dim)
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_hidden_layers)
        for name in ("layer_windows", "layer_ropes", "linear_layers", "sparse_layers"):
            entries = getattr(self, name)
            if entries and len(entries) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(entries)} entries for {self.num_hidden_layers} layers")

    @property
    def rope_head_dim(self) -> int:
        """The dims of a head that the rotary embedding is for."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def kernel_head_dim(self) -> int:
        """Of the heads that attention kernels get, which take q, k and v of one width."""
        return self.head_dim if self.latent is None else max(self.head_dim, self.latent.value_dim)

    @property
    def rope_of_layer(self) -> tuple[RopeConfig | None, ...]:
        """Each layer's rotary embedding."""
        return self.layer_ropes or (self.rope,) * self.num_hidden_layers

    @property
    def is_linear(self) -> tuple[bool, ...]:
        """Whether each layer is a gated delta-net."""
        return self.linear_layers or (False,) * self.num_hidden_layers

    @property
    def is_sparse(self) -> tuple[bool, ...]:
        """Whether each layer's MLP is a mixture of experts."""
        return self.sparse_layers or (self.mixture is not None,) * self.num_hidden_layers

    def of_layers(self, *layers: int) -> "ModelConfig":
        """The same decoder with these of its layers alone."""
        return replace(
            self,
            num_hidden_layers=len(layers),
            layer_windows=tuple(self.layer_windows[layer] for layer in layers),
            layer_ropes=tuple(self.layer_ropes[layer] for layer in layers) if self.layer_ropes else (),
            linear_layers=tuple(self.is_linear[layer] for layer in layers),
            sparse_layers=tuple(self.is_sparse[layer] for layer in layers),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json as transformers 4 or 5 writes it, of the families in :mod:`qsharded.models.families`.

        Of a multimodal model it is the text part's.

        Raises ValueError that names an unknown model type or architecture, a missing key, and any key that is unknown
        or holds a value this decoder does not compute.
        """
        from qsharded.models.families.reading import (
            read_settings,  # here: the families' table is made of this file's words
        )

        with named("config.json"):
            check_model_config(config, "config.json")
            return cls(**read_settings(config))


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json names, as transformers reads it: torch_dtype is the older spelling."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return None if dtype is None else str(dtype)
