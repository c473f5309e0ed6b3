"""A transformers model on the meta device, from config.json alone; no code but the library's own is run."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from qsharded.models.transformers_code import attention
from qsharded.models.transformers_code.description import TransformersConfig
from qsharded.models.transformers_code.own_head import around_head
from qsharded.models.transformers_code.structure import find_parts

_NOT_OF_THE_MODEL = ("quantization_config", "torch_dtype", "dtype", "auto_map")


def describe(described: Mapping[str, Any]) -> TransformersConfig:
    """See :meth:`TransformersConfig.from_hf`."""
    kept = {key: value for key, value in described.items() if key not in _NOT_OF_THE_MODEL}
    config = _config(kept)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{config.model_type!r} is a model of more than text, whose text part transformers' code does not run here"
        )
    with torch.device("meta"):
        hf = _model(config, "eager", torch.float32)
    parts, text = find_parts(hf), config.get_text_config()
    around = around_head(hf, parts)
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    return TransformersConfig(
        described=kept,
        model_type=config.model_type,
        vocab_size=embedding.num_embeddings,
        hidden_size=head.in_features,
        num_hidden_layers=text.num_hidden_layers,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 1 << 62,
        tie_word_embeddings=head.weight is embedding.weight,
        parts=parts,
        head_factor=around.factor,
        softcap=around.softcap,
        attention=_attention(hf, config),
    )


def build(config: TransformersConfig, dtype: torch.dtype) -> Any:
    """The model, on the device that is torch's default in this context."""
    own = _config({**config.described, "tie_word_embeddings": config.tie_word_embeddings})
    return _model(own, config.attention, dtype)


def _config(described: Mapping[str, Any]) -> PretrainedConfig:
    keys = {key: _floats(value) for key, value in described.items()}
    try:
        return AutoConfig.for_model(keys.pop("model_type", None), **keys)
    except Exception as error:  # its kinds change with the library's versions
        raise ValueError(f"transformers does not read this config.json: {error}") from error


def _floats(value: Any) -> Any:
    """``value`` with the floats that JSON lacks, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        tagged = value.get("__float__")
        return float(tagged) if isinstance(tagged, str) else {key: _floats(of_key) for key, of_key in value.items()}
    return [_floats(entry) for entry in value] if isinstance(value, list) else value


def _model(config: PretrainedConfig, implementation: str, dtype: torch.dtype) -> Any:
    attention.register()
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation, trust_remote_code=False
        )
    except Exception as error:
        raise ValueError(f"transformers cannot build {config.model_type!r} from this config.json: {error}") from error


def _attention(hf: Any, config: PretrainedConfig) -> str:
    """Ours where the model's code leaves masks to the attention function; else the best that it supports."""
    if hf._supports_flash_attn and _takes_ours(config):
        return attention.NAME
    return "sdpa" if hf._supports_sdpa else "eager"


def _takes_ours(config: PretrainedConfig) -> bool:
    """Some of the older models have a class for each attention function that they know."""
    try:
        with torch.device("meta"):
            _model(config, attention.NAME, torch.float32)
    except ValueError:
        return False
    return True
