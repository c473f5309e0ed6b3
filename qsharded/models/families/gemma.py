"""Gemma 2 and 3."""

from qsharded.models import layer_patterns
from qsharded.models.config import NormNames
from qsharded.models.families.family import Family, Settings, Values, biases

_GEMMA_NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_GEMMA_ACTIVATION = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh",)}


def _gemma(values: Values) -> Settings:
    return biases(values) | {
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
    return _gemma(values) | {"qk_norm": True, "layer_windows": layer_patterns.by_types(values, _gemma3_types(values))}


def _gemma3_types(values: Values) -> list[str]:
    # transformers writes the pattern with an underscore once it has made layer_types of it
    period = values["sliding_window_pattern"] or values["_sliding_window_pattern"]
    return layer_patterns.types(values, layer_patterns.every(period, values))


def _gemma3_ropes(values: Values) -> Settings:
    local = {"rope_theta": values["rope_local_base_freq"]}
    return layer_patterns.ropes_by_type(values, _gemma3_types(values), full={"rope_theta": 1e6}, sliding=local)


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
    "sliding_window_size": None,  # a repetition of sliding_window, which nobody reads
}
_GEMMA3_DEFAULTS = {key: value for key, value in _GEMMA2_DEFAULTS.items() if key != "attn_logit_softcapping"} | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
}


FAMILIES = {
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
