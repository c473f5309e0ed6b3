"""The families of models that are computed natively: how each one's config.json becomes a ModelConfig.

A family is an entry of ``FAMILIES``; its mathematics is in the decoder. The defaults are those of its configuration
class in transformers, for the keys that a config.json leaves out. The list in README is made from here, and the tests
go through it (tests/models/variants.py).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qsharded.models import layer_patterns
from qsharded.models.config import LinearAttention, NormNames
from qsharded.models.config_keys import SHAPE_KEYS, check_keys
from qsharded.models.rope import RopeConfig

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
Settings = dict[str, Any]
"""Fields of a ModelConfig."""

_COMMON: Settings = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


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


def _biases(values: Values) -> Settings:
    """attention_bias is of q, k, v and o; mlp_bias of the MLP."""
    attention = bool(values.get("attention_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(values.get("mlp_bias"))}


def _llama(values: Values) -> Settings:
    return _biases(values)


def _mistral(values: Values) -> Settings:
    return {"layer_windows": layer_patterns.everywhere(values)}


def _qwen2(values: Values) -> Settings:
    return {"qkv_bias": True, "layer_windows": layer_patterns.last_layers(values)}


def _qwen3(values: Values) -> Settings:
    return _biases(values) | {"qk_norm": True, "layer_windows": layer_patterns.last_layers(values)}


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama 2 and 3, SmolLM2, Falcon 3",
        "LlamaForCausalLM",
        defaults={"attention_bias": False, "mlp_bias": False},
        settings=_llama,
    ),
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        "sliding window",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        settings=_mistral,
    ),
    "qwen2": Family(
        "Qwen2 and 2.5",
        "Qwen2ForCausalLM",
        "biases of q, k and v; sliding windows in some layers",
        defaults={"num_key_value_heads": 32, **_QWEN_WINDOWS},
        settings=_qwen2,
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        "q and k normalised; sliding windows in some layers",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_QWEN_WINDOWS},
        settings=_qwen3,
    ),
}

# Gemma

_GEMMA_NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_GEMMA_ACTIVATION = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh",)}


def _gemma(values: Values) -> Settings:
    return _biases(values) | {
        "norms": _GEMMA_NORMS,
        "norm_offset": True,
        "activation": "gelu_tanh",
        "attention_scale": values["query_pre_attn_scalar"] ** -0.5,
        "embedding_multiplier": values["hidden_size"] ** 0.5,
        "embedding_multiplier_rounded": True,
        "logit_softcap": values["final_logit_softcapping"],
    }


def _gemma2(values: Values) -> Settings:
    windows = layer_patterns.by_types(values, layer_patterns.every(2, values))
    return _gemma(values) | {"layer_windows": windows, "score_softcap": values["attn_logit_softcapping"]}


def _gemma3(values: Values) -> Settings:
    # transformers writes the pattern with an underscore once it has made layer_types of it
    pattern = values["sliding_window_pattern"] or values["_sliding_window_pattern"]
    windows = layer_patterns.by_types(values, layer_patterns.every(pattern, values))
    return _gemma(values) | {"qk_norm": True, "layer_windows": windows}


def _gemma3_ropes(values: Values) -> Settings:
    types = layer_patterns.types(
        values, layer_patterns.every(values["sliding_window_pattern"] or values["_sliding_window_pattern"], values)
    )
    local = {"rope_theta": values["rope_local_base_freq"]}
    return layer_patterns.ropes_by_type(values, types, full={"rope_theta": 1e6}, sliding=local)


_GEMMA2_DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3_DEFAULTS = {key: value for key, value in _GEMMA2_DEFAULTS.items() if key != "attn_logit_softcapping"} | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
}
FAMILIES |= {
    "gemma2": Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "four norms a layer, of 1 + weight; embedding x sqrt(D); gelu; soft-caps of scores and logits; every other "
        "layer has a sliding window",
        defaults=_GEMMA2_DEFAULTS,
        settings=_gemma2,
        neutral={**_GEMMA_ACTIVATION, "use_bidirectional_attention": (False,)},
    ),
    "gemma3_text": Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "as Gemma 2, with q and k normalised instead of soft-caps; five of six layers have a sliding window and a "
        "rotary base of their own",
        defaults=_GEMMA3_DEFAULTS,
        settings=_gemma3,
        ropes=_gemma3_ropes,
        neutral={**_GEMMA_ACTIVATION, "use_bidirectional_attention": (False,), "attn_logit_softcapping": (None,)},
    ),
}

# Phi


def _phi3(values: Values) -> Settings:
    return {"fused_qkv": True, "mlp": "fused", "layer_windows": layer_patterns.everywhere(values)}


def _phi3_rope(values: Values) -> Settings:
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):  # names that longrope had before
        given |= {"rope_type": "longrope"}
    if (given.get("rope_type") or given.get("type")) == "longrope":
        given["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    else:
        given.pop("original_max_position_embeddings", None)
    return {"rope": RopeConfig.of(given, values)}


FAMILIES |= {
    "phi3": Family(
        "Phi-3, Phi-4",
        "Phi3ForCausalLM",
        "qkv_proj and gate_up_proj; partial rotary embedding; longrope, chosen by each document's length",
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": None,
        },
        settings=_phi3,
        ropes=_phi3_rope,
        neutral={"resid_pdrop": (0,), "embd_pdrop": (0,)},
        partial_rotary=True,
    ),
}

# Mistral 3


def _query_scale(values: Values) -> Settings:
    """The rotary embedding's parameters hold it."""
    given = _rope_parameters(values)
    beta, length = given.get("llama_4_scaling_beta"), given.get("original_max_position_embeddings")
    return {"query_scale_beta": beta, "query_scale_length": length} if beta else {}


def _rope_parameters(values: Values) -> dict[str, Any]:
    return dict(values.get("rope_scaling") or values.get("rope_parameters") or {})


def _ministral(values: Values) -> Settings:
    otherwise = layer_patterns.every(0, values) if values["sliding_window"] else []
    return {"layer_windows": layer_patterns.by_types(values, otherwise)}


def _ministral3(values: Values) -> Settings:
    return _mistral(values) | _query_scale(values)


def _ministral3_rope(values: Values) -> Settings:
    given = _rope_parameters(values) or _MINISTRAL3_ROPE
    beside = ("llama_4_scaling_beta", "max_position_embeddings")  # of q, and a repetition
    return {"rope": RopeConfig.of({key: given[key] for key in given if key not in beside}, values)}


_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_MISTRAL_SHAPE = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
FAMILIES |= {
    "ministral": Family(
        "Ministral (2024)",
        "MinistralForCausalLM",
        "sliding windows in some layers",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None},
        settings=_ministral,
    ),
    "ministral3": Family(
        "Ministral 3",
        "Ministral3ForCausalLM",
        "yarn; q scaled by position beyond the original context",
        defaults={
            **_MISTRAL_SHAPE,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        settings=_ministral3,
        ropes=_ministral3_rope,
    ),
}

# OLMo

_POST_NORMS = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _olmo2(values: Values) -> Settings:
    return _biases(values) | {"norms": _POST_NORMS, "qk_norm": True, "qk_norm_place": "width"}


def _olmo3_types(values: Values) -> list[str]:
    return layer_patterns.types(values, layer_patterns.every(4, values))


def _olmo3(values: Values) -> Settings:
    return _olmo2(values) | {"layer_windows": layer_patterns.by_types(values, _olmo3_types(values))}


def _olmo3_ropes(values: Values) -> Settings:
    theta = {"rope_theta": values.get("rope_theta") or 500_000.0}
    return layer_patterns.ropes_by_type(values, _olmo3_types(values), full=theta, sliding=theta)


_OLMO_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
FAMILIES |= {
    "olmo2": Family(
        "OLMo 2",
        "Olmo2ForCausalLM",
        "norms after attention and MLP; q and k normalised over all heads",
        defaults=_OLMO_DEFAULTS,
        settings=_olmo2,
    ),
    "olmo3": Family(
        "OLMo 3",
        "Olmo3ForCausalLM",
        "as OLMo 2; three of four layers have a sliding window and a rotary embedding of their own",
        defaults={**_OLMO_DEFAULTS, "sliding_window": 4096, "layer_types": None},
        settings=_olmo3,
        ropes=_olmo3_ropes,
    ),
}

# Granite, SmolLM3, Seed-OSS, Arcee


def _granite(values: Values) -> Settings:
    return _biases(values) | {
        "attention_scale": values["attention_multiplier"],
        "embedding_multiplier": values["embedding_multiplier"],
        "residual_multiplier": values["residual_multiplier"],
        "logit_multiplier": 1 / values["logits_scaling"],
    }


def _has_rope(values: Values) -> list[bool]:
    """SmolLM3's: ``no_rope_layers`` has a 1 for a layer *with* rotary embedding."""
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    said = values["no_rope_layers"] or [(layer + 1) % interval for layer in range(layers)]
    return [bool(said[layer]) for layer in range(layers)]


def _smollm3(values: Values) -> Settings:
    slides = values["use_sliding_window"] and values["sliding_window"] is not None
    types = [layer_patterns.SLIDING if slides and not has else layer_patterns.FULL for has in _has_rope(values)]
    return _biases(values) | {"layer_windows": layer_patterns.by_types(values, types)}


def _smollm3_ropes(values: Values) -> Settings:
    rope = RopeConfig.of(_rope_parameters(values), {**values, "rope_theta": values.get("rope_theta") or 2e6})
    return {"rope": rope, "layer_ropes": tuple(rope if has else None for has in _has_rope(values))}


def _seed_oss(values: Values) -> Settings:
    return _biases(values) | {"o_bias": bool(values["attention_out_bias"])}


def _arcee(values: Values) -> Settings:
    return _biases(values) | {"mlp": "ungated", "activation": "relu2"}


FAMILIES |= {
    "granite": Family(
        "Granite 3",
        "GraniteForCausalLM",
        "multipliers of embedding, residual stream, scores and logits",
        defaults={
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        settings=_granite,
        published={"residual_multiplier": 0.22},
    ),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "every fourth layer without rotary embedding",
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        settings=_smollm3,
        ropes=_smollm3_ropes,
        neutral={"max_window_layers": (0, 28, 36)},
    ),
    "seed_oss": Family(
        "Seed-OSS",
        "SeedOssForCausalLM",
        "biases of q, k and v",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        settings=_seed_oss,
        dropouts=("attention_dropout", "residual_dropout"),
    ),
    "arcee": Family(
        "Arcee AFM",
        "ArceeForCausalLM",
        "MLP of relu^2 without a gate; yarn",
        defaults={"rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
        settings=_arcee,
        neutral={"hidden_act": ("relu2",)},
    ),
}

# GLM-4, EXAONE 4, ERNIE 4.5, Hunyuan


def _glm4(values: Values) -> Settings:
    norms = NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return {"norms": norms, "mlp": "fused", "rope_interleaved": True, "qkv_bias": bool(values["attention_bias"])}


def _exaone4_types(values: Values) -> list[str]:
    pattern, layers = values["sliding_window_pattern"], values["num_hidden_layers"]
    if values["sliding_window"] is None or not pattern:
        return layer_patterns.types(values, [layer_patterns.FULL] * layers)
    if isinstance(pattern, str):  # "LLLG"; the last layer sees all in any case
        letters = [pattern[layer % len(pattern)] for layer in range(layers - 1)] + ["G"]
        return layer_patterns.types(
            values, [{"L": layer_patterns.SLIDING}.get(x, layer_patterns.FULL) for x in letters]
        )
    return layer_patterns.types(values, layer_patterns.every(pattern, values))


def _exaone4(values: Values) -> Settings:
    windows = layer_patterns.by_types(values, _exaone4_types(values))
    return {"norms": _POST_NORMS, "qk_norm": True, "layer_windows": windows}


def _exaone4_ropes(values: Values) -> Settings:
    """In a model with windows the layers that see all have no rotary embedding."""
    rope, is_hybrid = RopeConfig.from_hf(values), values["sliding_window"] is not None
    types = _exaone4_types(values)
    return {
        "rope": rope,
        "layer_ropes": tuple(None if is_hybrid and kind == layer_patterns.FULL else rope for kind in types),
    }


def _ernie(values: Values) -> Settings:
    bias = bool(values["use_bias"])
    return {"rope_interleaved": True, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}


def _ernie_rope(values: Values) -> Settings:
    return {"rope": RopeConfig.of(_rope_parameters(values), {**values, "rope_theta": values.get("rope_theta") or 5e5})}


def _hunyuan(values: Values) -> Settings:
    attention = bool(values["attention_bias"])
    return {"qk_norm": True, "qk_norm_place": "rotated head", "qkv_bias": attention, "o_bias": attention}


def _hunyuan_rope(values: Values) -> Settings:
    """Its "dynamic" has a fixed ``alpha``, beside which nothing else counts."""
    given = _rope_parameters(values)
    if (given.get("rope_type") or given.get("type")) == "dynamic" and given.get("alpha"):
        known = ("alpha", "rope_theta")
        given = {"rope_type": "ntk-alpha"} | {key: given[key] for key in known if key in given}
    return {"rope": RopeConfig.of(given, values)}


FAMILIES |= {
    "glm4": Family(
        "GLM-4 (0414)",
        "Glm4ForCausalLM",
        "gate_up_proj; norms before and after attention and MLP; half of each head is rotated, by neighbours",
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-7,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        settings=_glm4,
        partial_rotary=True,
    ),
    "exaone4": Family(
        "EXAONE 4",
        "Exaone4ForCausalLM",
        "norms after attention and MLP; q and k normalised; three of four layers have a sliding window, the others no "
        "rotary embedding",
        defaults={
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        settings=_exaone4,
        ropes=_exaone4_ropes,
    ),
    "ernie4_5": Family(
        "ERNIE 4.5",
        "Ernie4_5ForCausalLM",
        "rotary embedding of neighbours",
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "use_bias": False,
        },
        settings=_ernie,
        ropes=_ernie_rope,
    ),
    "hunyuan_v1_dense": Family(
        "Hunyuan (dense)",
        "HunYuanDenseV1ForCausalLM",
        "q and k normalised once they are rotated; a rotary base stretched by a fixed alpha",
        defaults={"rms_norm_eps": 1e-5, "attention_bias": False},
        settings=_hunyuan,
        ropes=_hunyuan_rope,
    ),
}

# Qwen3.5


def _linear_types(values: Values) -> list[str]:
    interval, layers = values["full_attention_interval"], values["num_hidden_layers"]
    otherwise = [_LINEAR if (layer + 1) % interval else layer_patterns.FULL for layer in range(layers)]
    types = layer_patterns.types(values, otherwise)
    for unknown in sorted(set(types) - {_LINEAR, layer_patterns.FULL}):
        raise ValueError(f"layer_types: {unknown!r} is not supported ({_LINEAR} and {layer_patterns.FULL} are)")
    return types


def _qwen3_5(values: Values) -> Settings:
    linear = LinearAttention(
        key_heads=values["linear_num_key_heads"],
        value_heads=values["linear_num_value_heads"],
        key_dim=values["linear_key_head_dim"],
        value_dim=values["linear_value_head_dim"],
        taps=values["linear_conv_kernel_dim"],
    )
    return _biases(values) | {
        "qk_norm": True,
        "norm_offset": True,
        "attention_gate": True,
        "linear": linear,
        "linear_layers": tuple(kind == _LINEAR for kind in _linear_types(values)),
    }


def _qwen3_5_rope(values: Values) -> Settings:
    """The three positions of a text's token are one, so that what mixes them changes nothing."""
    given = _rope_parameters(values)
    return {"rope": RopeConfig.of({key: given[key] for key in given if not key.startswith("mrope_")}, values)}


_LINEAR = "linear_attention"
FAMILIES |= {
    "qwen3_5_text": Family(
        "Qwen3.5 (dense)",
        "Qwen3_5ForCausalLM",
        "gated delta-net layers beside gated attention; a quarter of each head is rotated; norms of 1 + weight",
        defaults={
            "vocab_size": 248_320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "layer_types": None,
            "full_attention_interval": 4,
            # of layers that predict further tokens, which are not trained
            "mtp_num_hidden_layers": None,
            "mtp_use_dedicated_embeddings": None,
        },
        settings=_qwen3_5,
        ropes=_qwen3_5_rope,
        neutral={"attn_output_gate": (True,), "mlp_only_layers": ([],), "mamba_ssm_dtype": ("float32",)},
        partial_rotary=True,
    ),
}

WRAPPERS: dict[str, Wrapper] = {
    "qwen3_5": Wrapper(
        "Qwen3.5, multimodal",
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5_text",
        tied=False,
        keys=frozenset({"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}),
    ),
    "mistral3": Wrapper(
        "Mistral Small 3.1 and Ministral 3, multimodal",
        "Mistral3ForConditionalGeneration",
        "mistral",
        tied=True,
        keys=frozenset(
            {
                "image_token_index",
                "image_token_id",
                "projector_hidden_act",
                "vision_feature_layer",
                "multimodal_projector_bias",
                "spatial_merge_size",
            }
        ),
    ),
    "gemma3": Wrapper(
        "Gemma 3, multimodal",
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        tied=True,
        keys=frozenset(
            {"mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id"}
        ),
    ),
}


def read_settings(config: Values) -> Settings:
    """The fields of the ModelConfig that a config.json describes; errors are those of ``ModelConfig.from_hf``."""
    if config.get("model_type") in WRAPPERS:
        return _of_text_part(config)
    family = _family(config)
    values = {**_COMMON, **family.defaults, **config}
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
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {supported}")
    family = FAMILIES[model_type]
    _check_architecture(config, family.architecture)
    return family


def _check_architecture(config: Values, architecture: str) -> None:
    architectures = config.get("architectures") or [architecture]
    if architecture not in architectures:
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
