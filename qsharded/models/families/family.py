"""What a family of models is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qsharded.models.layer_shapes import ExpertMixture
from qsharded.models.rope import RopeConfig

Values = Mapping[str, Any]
"""A config.json, with a family's defaults."""
Settings = dict[str, Any]
"""Fields of a ModelConfig."""


def _nothing(values: Values) -> Settings:
    return {}


def _one_rope(values: Values) -> Settings:
    return {"rope": RopeConfig.from_hf(values)}


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        title: the models that people know.
        architecture: transformers' class.
        beyond: what it computes that Llama does not, for readers.
        defaults: keys that it reads beside the common ones -> what a config.json without them means.
        settings: its fields of a ModelConfig beside the shape.
        ropes: ``rope`` and ``layer_ropes``.
        neutral: key -> values that change nothing, where these are not Llama's.
        partial_rotary: whether a part of a head may be rotated.
        own_code: what its authors' modelling code is called, where ``auto_map`` names it beside the weights: the class
            in transformers was made of it, and computes the same. Other code is refused.
        also: other names of the architecture.
        dropouts: keys of dropout that transformers applies in training and this decoder does not.
        published: keys of its published models that decide how its layers run, for readers.
    """

    title: str
    architecture: str
    beyond: str = ""
    defaults: Values = field(default_factory=dict)
    settings: Callable[[Values], Settings] = _nothing
    ropes: Callable[[Values], Settings] = _one_rope
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    partial_rotary: bool = False
    own_code: str = ""
    also: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    published: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model whose text part is one of the families.

    Attributes:
        architecture: transformers' class.
        text_type: model_type of the text part, where ``text_config`` names none.
        tied: the default of its ``tie_word_embeddings``.
        keys: of its config.json that say nothing of the text part.
    """

    title: str
    architecture: str
    text_type: str
    tied: bool
    keys: frozenset[str]


def biases(values: Values) -> Settings:
    """attention_bias is of q, k, v and o; mlp_bias of the MLP."""
    attention = bool(values.get("attention_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(values.get("mlp_bias"))}


def mixture(values: Values, *, experts: str, size: str, **settings: Any) -> ExpertMixture:
    """That of ``num_experts_per_tok`` of as many experts as the key ``experts`` says, each of the ``size`` of another.

    Raises:
        ValueError: a key has no number.
    """
    for key in (experts, size, "num_experts_per_tok"):
        if not values[key]:
            raise ValueError(f"{key} must be a whole number of at least 1 in a mixture of experts, got {values[key]!r}")
    return ExpertMixture(values[experts], values["num_experts_per_tok"], values[size], **settings)


def rope_parameters(values: Values) -> dict[str, Any]:
    """Of the rotary embedding, as transformers 4 or 5 calls them."""
    return dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
