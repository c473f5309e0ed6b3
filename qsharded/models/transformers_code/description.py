"""What the commands need to know of a model that transformers' code computes, before any of it is built.

Nothing here imports transformers until a model is described.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qsharded.models.parts import PartNames

NEEDED = "pip install 'qsharded[transformers]'"


@dataclass(frozen=True)
class TransformersConfig:
    """A config.json that transformers reads, with what our commands ask of it.

    Attributes:
        described: the content of config.json, without how its weights are stored.
        parts: where the model keeps its layers, embedding and head.
        head_factor: what its logits are the head's product times; None: something else is around the head.
        softcap: c of c tanh(logit / c), or None.
        wrapper: "", as for a model of text.
        attention: the attention implementation that the model runs with, as transformers calls it.
    """

    wrapper: ClassVar[str] = ""

    described: Mapping[str, Any]
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    parts: PartNames = field(default_factory=PartNames)
    head_factor: float | None = 1.0
    softcap: float | None = None
    attention: str = "sdpa"

    @classmethod
    def from_hf(cls, described: Mapping[str, Any]) -> "TransformersConfig":
        """Read a config.json. The model is built once on the meta device, to see what it is made of.

        Raises:
            ValueError: transformers is not installed, does not know the model, or has no causal language model of its
                type; or the model is made otherwise than what is trained here, by name.
        """
        from qsharded.models.transformers_code import build  # here: transformers is optional, and loads slowly

        return build.describe(described)


def is_known(model_type: Any) -> bool:
    """Whether transformers is installed and has a causal language model of this type."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
