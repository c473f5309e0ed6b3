"""What the values of a config.json may be. The limits lie far above any model's, and below what harms."""

from collections.abc import Mapping
from typing import Any

from qsharded.utils.untrusted_json import BOOLEAN, NULL, Kind, as_object, check, integer, list_of, number, shown, text

MOST_LAYERS = 1_000  # each takes modules, before any weight is looked for
_COUNT, _WIDTH = integer(1, 1 << 16), integer(1, 1 << 22)
_POSITIONS = integer(1, 1 << 40)
_FACTOR = number(0, 1e6)
_FRACTION, _PERIOD = number(0, 1), integer(0, MOST_LAYERS)
_EXPERTS = integer(0, 1 << 14)
_NAMES = list_of(text(100), MOST_LAYERS)
_TOKEN = integer(-1, (1 << 31) - 1)

_ROPE: dict[str, Kind] = {
    "rope_type": text(100) | NULL,
    "type": text(100) | NULL,
    "rope_theta": number(1, 1e15) | NULL,  # 1 would not rotate, and YaRN divides by its logarithm
    "factor": _FACTOR | NULL,
    "low_freq_factor": _FACTOR | NULL,
    "high_freq_factor": _FACTOR | NULL,
    "original_max_position_embeddings": _POSITIONS | NULL,
    "attention_factor": _FACTOR | NULL,
    "beta_fast": _FACTOR | NULL,
    "beta_slow": _FACTOR | NULL,
    "mscale": number(0, 1e6, or_equal=True) | NULL,
    "mscale_all_dim": number(0, 1e6, or_equal=True) | NULL,
    "truncate": BOOLEAN | NULL,
    "partial_rotary_factor": _FRACTION | NULL,
    "alpha": _FACTOR | NULL,
    "short_factor": list_of(_FACTOR, 1 << 16) | NULL,
    "long_factor": list_of(_FACTOR, 1 << 16) | NULL,
    "llama_4_scaling_beta": number(0, 1e6, or_equal=True) | NULL,
}
_MODEL: dict[str, Kind] = {
    "model_type": text(100) | NULL,
    "architectures": list_of(text(200), 100) | NULL,
    "vocab_size": integer(1, (1 << 31) - 1) | NULL,
    "hidden_size": _WIDTH | NULL,
    "intermediate_size": _WIDTH | NULL,
    "num_hidden_layers": integer(1, MOST_LAYERS) | NULL,
    "num_attention_heads": _COUNT | NULL,
    "num_key_value_heads": _COUNT | NULL,
    "head_dim": _COUNT | NULL,
    "max_position_embeddings": _POSITIONS | NULL,
    "rms_norm_eps": number(0, 1, or_equal=True),
    "tie_word_embeddings": BOOLEAN,
    "attention_bias": BOOLEAN | NULL,
    "mlp_bias": BOOLEAN | NULL,
    "rope_theta": number(1, 1e15) | NULL,
    "use_sliding_window": BOOLEAN | NULL,
    "sliding_window": _POSITIONS | NULL,
    "max_window_layers": integer(0, MOST_LAYERS) | NULL,
    "layer_types": _NAMES | NULL,
    "sliding_window_pattern": _PERIOD | text(MOST_LAYERS) | NULL,
    "_sliding_window_pattern": _PERIOD | NULL,
    "full_attention_interval": integer(1, MOST_LAYERS) | NULL,
    "no_rope_layers": list_of(integer(0, 1), MOST_LAYERS) | NULL,
    "no_rope_layer_interval": integer(1, MOST_LAYERS) | NULL,
    "rope_local_base_freq": number(1, 1e15) | NULL,
    "partial_rotary_factor": _FRACTION | NULL,
    "original_max_position_embeddings": _POSITIONS | NULL,
    "query_pre_attn_scalar": _FACTOR,
    "attn_logit_softcapping": _FACTOR | NULL,
    "final_logit_softcapping": _FACTOR | NULL,
    "attention_multiplier": _FACTOR,
    "embedding_multiplier": _FACTOR,
    "residual_multiplier": _FACTOR,
    "logits_scaling": _FACTOR,
    "attention_out_bias": BOOLEAN | NULL,
    "use_bias": BOOLEAN | NULL,
    "attn_output_gate": BOOLEAN | NULL,
    "linear_num_key_heads": _COUNT | NULL,
    "linear_num_value_heads": _COUNT | NULL,
    "linear_key_head_dim": _COUNT | NULL,
    "linear_value_head_dim": _COUNT | NULL,
    "linear_conv_kernel_dim": integer(1, 1 << 10) | NULL,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), _EXPERTS | NULL),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "decoder_sparse_step"), _EXPERTS | NULL),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), integer(0, 1 << 22) | NULL),
    **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers"), integer(0, MOST_LAYERS) | NULL),
    **dict.fromkeys(("norm_topk_prob", "use_qk_norm", "rope_interleave"), BOOLEAN | NULL),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), _WIDTH | NULL),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"), _COUNT | NULL),
    "mlp_layer_types": _NAMES | NULL,
    "topk_method": text(100) | NULL,
    **dict.fromkeys(("routed_scaling_factor", "swiglu_limit", "swiglu_alpha"), _FACTOR | NULL),
    "mlp_only_layers": list_of(integer(0, MOST_LAYERS), MOST_LAYERS) | NULL,
    "dtype": text(100) | NULL,
    "torch_dtype": text(100) | NULL,
    "bos_token_id": _TOKEN | list_of(_TOKEN, 1000) | NULL,
    "eos_token_id": _TOKEN | list_of(_TOKEN, 1000) | NULL,
    "pad_token_id": _TOKEN | list_of(_TOKEN, 1000) | NULL,
}
_QUANTIZATION: dict[str, Kind] = {
    "quant_method": text(100) | NULL,
    "format": text(100),
    "block_size": integer(1, 1 << 20),
    "bnb_4bit_quant_type": text(100),
    "llm_int8_skip_modules": list_of(text(), 1 << 20) | NULL,
}


def check_model_config(config: Mapping[str, Any], origin: str) -> None:
    """Raise ValueError, naming the key, where a value is of another type or out of all proportion.

    Keys that the schema does not have, and the combination of values, are left to whoever reads them.
    """
    check(config, _MODEL, origin)
    for part in ("rope_scaling", "rope_parameters"):
        if config.get(part) is not None:
            _check_rope(as_object(config[part], f"{origin}: {part}"), f"{origin}: {part}")
    for part, check_part in (("quantization_config", _check_quantization), ("text_config", check_model_config)):
        if config.get(part) is not None:
            check_part(as_object(config[part], f"{origin}: {part}"), f"{origin}: {part}")


def _check_quantization(quantization: Mapping[str, Any], origin: str) -> None:
    check(quantization, _QUANTIZATION, origin)


def _check_rope(rope: Mapping[str, Any], origin: str) -> None:
    check(rope, _ROPE, origin)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"{origin}: high_freq_factor must be above low_freq_factor, {low}, got {high}")
    for kind, values in rope.items():  # some models have one for each type of layer
        if isinstance(values, dict) or (kind.endswith("_attention") and values is not None):
            _check_rope(as_object(values, f"{origin}: {shown(kind)}"), f"{origin}: {shown(kind)}")
