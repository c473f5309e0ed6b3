"""From a config.json to the fields of a ModelConfig, strictly."""

import logging

from qsharded.models.config_keys import SHAPE_KEYS, check_keys
from qsharded.models.config_spellings import respelled
from qsharded.models.families import FAMILIES, WRAPPERS
from qsharded.models.families.family import Family, Settings, Values
from qsharded.models.rope import RopeConfig

logger = logging.getLogger(__name__)

_COMMON: Settings = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def read_settings(config: Values) -> Settings:
    """The fields of the ModelConfig that a config.json describes; errors are those of ``ModelConfig.from_hf``."""
    config = respelled(config)
    if config.get("model_type") in WRAPPERS:
        return _of_text_part(config)
    family = _family(config)
    values = {**_COMMON, **family.defaults, **_without_own_code(config, family)}
    check_keys(values, {*_COMMON, *family.defaults, *family.dropouts}, family.neutral)
    _say_dropouts(values, family)
    heads = values["num_attention_heads"]
    # Every family agrees on null: as many key-value heads as heads, and heads that split the hidden size.
    shape: Settings = {
        **{key: values[key] for key in SHAPE_KEYS},
        "num_key_value_heads": values["num_key_value_heads"] or heads,
        "head_dim": values["head_dim"] or values["hidden_size"] // heads,
        "rms_norm_eps": values["rms_norm_eps"],
        "tie_word_embeddings": values["tie_word_embeddings"],
    }
    ropes = family.ropes(values)
    _check_whole_heads(ropes["rope"], family)
    return shape | ropes | family.settings(values)


def _of_text_part(config: Values) -> Settings:
    """A multimodal model's: its text part's, tied as the whole says."""
    wrapper = WRAPPERS[config["model_type"]]
    _check_architecture(config, wrapper.architecture)
    known = wrapper.keys | {"text_config", "vision_config", "tie_word_embeddings"}
    check_keys({**dict.fromkeys(SHAPE_KEYS, 0), **config}, known, {})
    text = {"model_type": wrapper.text_type, **(config.get("text_config") or {})}
    text = {**text, "architectures": None, "quantization_config": config.get("quantization_config")}
    tied = config.get("tie_word_embeddings", wrapper.tied)
    return read_settings(text) | {"tie_word_embeddings": bool(tied), "wrapper": config["model_type"]}


def _family(config: Values) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        supported = ", ".join([*FAMILIES, *WRAPPERS])
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {supported}. Others can be trained through "
            "transformers and PEFT, on the same packed layers: AutoModelForCausalLM.from_pretrained(NAME, "
            "quantization_config=QShardedConfig()), then get_peft_model; docs/transformers.md has an example that runs"
        )
    family = FAMILIES[model_type]
    _check_architecture(config, family.architecture, *family.also)
    return family


def _without_own_code(config: Values, family: Family) -> Values:
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM", "")
    if not family.own_code or not code.startswith(f"{family.own_code}."):
        return config
    return {key: value for key, value in config.items() if key != "auto_map"}


def _check_architecture(config: Values, architecture: str, *also: str) -> None:
    architectures = config.get("architectures") or [architecture]
    if not {architecture, *also}.intersection(architectures):
        raise ValueError(
            f"architectures {architectures!r} is not supported; a {config['model_type']} checkpoint must be a "
            f"{architecture}"
        )


def _check_whole_heads(rope: RopeConfig, family: Family) -> None:
    if rope.rotary_fraction != 1 and not family.partial_rotary:
        raise ValueError(
            f"rope key 'partial_rotary_factor' ({rope.rotary_fraction}) is not known for {family.architecture}"
        )


def _say_dropouts(values: Values, family: Family) -> None:
    for key in family.dropouts:
        if values.get(key):
            logger.warning("config.json's %s = %s is not applied in training", key, values[key])
