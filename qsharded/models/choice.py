"""Which code computes a model: ours where it can, else transformers'."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch

from qsharded.models.config import ModelConfig
from qsharded.models.decoder import CausalLM
from qsharded.models.families import FAMILIES, WRAPPERS
from qsharded.models.transformers_code.description import NEEDED, TransformersConfig, is_known

logger = logging.getLogger(__name__)

ModelCode = Literal["auto", "native", "transformers"]
AnyConfig = ModelConfig | TransformersConfig


def read_config(described: Mapping[str, Any], code: ModelCode = "auto") -> AnyConfig:
    """What config.json says of its model.

    Args:
        described: its content.
        code: "native" is ours; "transformers" that library's; "auto" ours where it has the family.

    Raises:
        ValueError: the model is not known, or holds what the code does not compute; each is named.
    """
    if code == "transformers":
        return TransformersConfig.from_hf(described)
    try:
        return ModelConfig.from_hf(described)
    except ValueError as refusal:
        if code == "native":
            raise
        return _foreign(described, refusal)


def _foreign(described: Mapping[str, Any], refusal: ValueError) -> TransformersConfig:
    model_type = described.get("model_type")
    if model_type in FAMILIES or model_type in WRAPPERS:
        raise ValueError(f"{refusal} (--model-code transformers takes that library's code for it)") from None
    if not is_known(model_type):
        raise ValueError(f"{refusal}; others run through transformers' code where it knows them: {NEEDED}") from None
    logger.info("model_type %r has no code here: transformers' own is used (--model-code)", model_type)
    return TransformersConfig.from_hf(described)


def build_model(config: AnyConfig, dtype: torch.dtype) -> CausalLM:
    """The model of ``config``, on torch's default device."""
    if isinstance(config, ModelConfig):
        return CausalLM(config, dtype=dtype)
    from qsharded.models.transformers_code.model import TransformersCausalLM  # here: transformers is optional

    return TransformersCausalLM(config, dtype=dtype)
