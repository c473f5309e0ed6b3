"""config.json of tiny models: every family of the registry in each spelling and with each feature that it has.

Names begin with the family's model_type. "-v4" is as transformers 4 writes it, the others as 5 does.
"""

from typing import Any

from qsharded.models.families import FAMILIES, WRAPPERS

VOCAB = 61
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 7}
_LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
}
_PHI4_LONG = {name: factors[:6] for name, factors in _LONG.items()}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

_QWEN3_5_MOE = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", FULL],
    "head_dim": 32,
    "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    **_DELTA_NET,
}

_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3},
    "llama-falcon3": {"head_dim": 32, "rope_theta": 1000042, "attention_bias": False, "mlp_bias": False},
    "llama-smollm2": {"tie_word_embeddings": True, "rope_theta": 100000, "rope_interleaved": False},
    "mistral-window": {"sliding_window": 7, "head_dim": 32, "rope_parameters": _DEFAULT_ROPE},
    "qwen2-window-v4": {
        "rope_theta": 300.0,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 32, "rope_parameters": _DEFAULT_ROPE, "layer_types": [FULL, FULL]},
    "qwen3-v4": {
        "head_dim": 16,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
        "attention_bias": False,
        "max_window_layers": 28,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **_GEMMA,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
        "layer_types": [SLIDING, FULL],
        "rope_parameters": _DEFAULT_ROPE,
        "tie_word_embeddings": True,
    },
    "gemma2-v4": {
        **_GEMMA,
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 1e4,
        "cache_implementation": "hybrid",
        "num_hidden_layers": 3,
    },
    "gemma2-no-caps": {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": {
        **_GEMMA,
        "layer_types": [SLIDING, FULL],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
        "use_bidirectional_attention": False,
    },
    "gemma3_text-v4": {
        **_GEMMA,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 5.0,
        "cache_implementation": "hybrid",
        "tie_word_embeddings": False,
    },
    "phi3": {"rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 1.0}, "sliding_window": None},
    "phi3-window-v4": {
        "sliding_window": 7,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "original_max_position_embeddings": 96,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_bias": False,
    },
    "phi3-longrope": {
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 12,
            **_PHI4_LONG,
        },
        "tie_word_embeddings": True,
    },
    "phi3-longrope-v4": {
        "original_max_position_embeddings": 12,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **_PHI4_LONG},
    },
    "phi3-su-v4": {
        "original_max_position_embeddings": 48,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "su", "original_max_position_embeddings": 48, **_LONG},
    },
    "ministral-v4": {"sliding_window": 7, "layer_types": [SLIDING, FULL], "rope_theta": 1e4, "head_dim": 16},
    "ministral3": {
        "head_dim": 32,
        "sliding_window": None,
        "rope_parameters": {
            **_YARN,
            "original_max_position_embeddings": 6,
            "max_position_embeddings": 96,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
            "type": "yarn",
        },
    },
    "ministral3-no-rope-keys": {"head_dim": 16, "tie_word_embeddings": True},
    "ministral3-short": {
        "head_dim": 16,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1},
        "tie_word_embeddings": True,
    },
    "olmo2": {"rope_parameters": _DEFAULT_ROPE, "attention_bias": False},
    "olmo2-v4": {"rope_theta": 500000, "rope_scaling": None, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "olmo3": {
        "sliding_window": 7,
        "layer_types": [SLIDING, FULL],
        "rope_parameters": {FULL: _YARN, SLIDING: {"rope_type": "default", "rope_theta": 1e4}},
    },
    "olmo3-v4": {
        "sliding_window": 7,
        "layer_types": [SLIDING, FULL],
        "rope_theta": 500000,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    },
    "granite": {
        "rope_parameters": _DEFAULT_ROPE,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "granite-biased-v4": {
        "rope_theta": 1e4,
        "rope_scaling": None,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
        "logits_scaling": 8.0,
    },
    "smollm3": {"no_rope_layers": [1, 0], "rope_parameters": _DEFAULT_ROPE, "layer_types": [FULL, FULL]},
    "smollm3-window-v4": {
        "no_rope_layer_interval": 2,
        "rope_theta": 2e6,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "seed_oss": {"head_dim": 32, "rope_parameters": _DEFAULT_ROPE, "attention_dropout": 0.1, "residual_dropout": 0.1},
    "seed_oss-biases-v4": {"head_dim": 16, "rope_theta": 1e7, "attention_out_bias": True, "mlp_bias": True},
    "arcee": {"hidden_act": "relu2", "rope_parameters": _YARN, "head_dim": 16},
    "arcee-biases-v4": {"hidden_act": "relu2", "rope_theta": 1e4, "attention_bias": True, "mlp_bias": True},
    "glm4": {"head_dim": 32, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
    "glm4-v4": {"head_dim": 16, "rope_theta": 1e4, "partial_rotary_factor": 0.25, "attention_bias": False},
    "exaone4": {
        "sliding_window": 7,
        "sliding_window_pattern": "LLLG",
        "layer_types": [SLIDING, FULL],
        "rope_parameters": _LLAMA3,
    },
    "exaone4-v4": {"sliding_window": 7, "sliding_window_pattern": 2, "rope_theta": 1e6, "num_hidden_layers": 3},
    "exaone4-no-window": {
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": [FULL, FULL],
        "rope_parameters": _DEFAULT_ROPE,
        "tie_word_embeddings": True,
    },
    "ernie4_5": {"head_dim": 32, "rope_parameters": _DEFAULT_ROPE, "use_bias": True},
    "ernie4_5-v4": {"head_dim": 16, "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True},
    "qwen3_5_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", FULL, "linear_attention"],
        "head_dim": 32,
        "rope_parameters": {
            **_DEFAULT_ROPE,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        **_DELTA_NET,
    },
    "qwen3_5_text-interval": {
        "full_attention_interval": 2,
        "head_dim": 16,
        "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        "attention_bias": True,
        "tie_word_embeddings": True,
        "attn_output_gate": True,
        "mtp_num_hidden_layers": 1,
        "mamba_ssm_dtype": "float32",
        **_DELTA_NET,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "rope_parameters": _DEFAULT_ROPE,
        "num_experts": 5,  # over two ranks a shard's edge falls inside the third
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "qwen3_moe-v4": {
        "head_dim": 16,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 128,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "sliding_window": None,
        "attention_bias": False,
    },
    "mixtral": {
        "intermediate_size": 128,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_parameters": _DEFAULT_ROPE,
        "sliding_window": 7,
    },
    "mixtral-v4": {
        "intermediate_size": 64,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "rope_theta": 1e6,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    },
    "glm4_moe": {
        "head_dim": 32,
        "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "glm4_moe-v4": {
        "head_dim": 16,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 1,
    },
    "deepseek_v2": {
        **_LATENT,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v2-lite-v4": {
        **_LATENT,
        "q_lora_rank": None,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 0,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
    },
    "deepseek_v3": {
        **_LATENT,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "attention_bias": True,
    },
    "deepseek_v3-moonlight-v4": {
        **_LATENT,
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "q_lora_rank": None,
        "v_head_dim": 48,  # wider than a head of q and k
        "rope_theta": 5e4,
        "rope_interleave": False,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-2,  # the latent vectors' norms have their own
    },
    "glm4_moe_lite": {
        **_LATENT,
        "qk_nope_head_dim": 24,
        "v_head_dim": 32,  # as wide as a head of q and k
        "rope_parameters": _DEFAULT_ROPE,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 7,
        "layer_types": [SLIDING, FULL],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "gpt_oss-v4": {
        "head_dim": 32,
        "intermediate_size": 64,
        "sliding_window": 7,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "initial_context_length": 24,
        "rope_theta": 150000,
        "rope_scaling": {**_YARN, "truncate": False},
        "swiglu_limit": 0.5,
        "attention_bias": True,
    },
    "qwen3_5_moe_text": {**_QWEN3_5_MOE},
    "qwen3_next": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", FULL],
        "head_dim": 32,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "partial_rotary_factor": 0.25,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_DELTA_NET,
    },
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": _DEFAULT_ROPE, "attention_bias": True},
    "hunyuan_v1_dense-alpha-v4": {
        "head_dim": 32,
        "rope_theta": 1e4,
        "rope_scaling": {
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "tie_word_embeddings": True,
    },
}


def model_type_of(variant: str) -> str:
    """The family that a variant's name begins with."""
    return max((name for name in [*FAMILIES, *WRAPPERS] if variant.split("-")[0] == name), key=len)


def _described(variant: str, settings: dict[str, Any]) -> dict[str, Any]:
    model_type = model_type_of(variant)
    return {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture], **_SHAPE, **settings}


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SIGLIP, _PIXTRAL = {"model_type": "siglip_vision_model", **_VISION}, {"model_type": "pixtral", **_VISION}
_GEMMA3_OF_TEXT = {"model_type": "gemma3_text", **_SHAPE, **_SETTINGS["gemma3_text"]}
# transformers' multimodal class caps no logits
_GEMMA3_V4_OF_TEXT = {**_SHAPE, **_SETTINGS["gemma3_text-v4"], "tie_word_embeddings": True} | {
    "final_logit_softcapping": None
}

_QWEN_VISION = {
    "model_type": "qwen3_5_vision",
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
}

# Multimodal models, of which the text part is trained.
_WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _GEMMA3_OF_TEXT,
        "vision_config": _SIGLIP,
        "image_token_index": 60,
        "mm_tokens_per_image": 1,
    },
    "gemma3-v4": {"text_config": _GEMMA3_V4_OF_TEXT, "vision_config": _SIGLIP, "image_token_index": 60},
    "qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text", **_SHAPE, **_SETTINGS["qwen3_5_text"]},
        "vision_config": _QWEN_VISION,
        "image_token_id": 58,
        "video_token_id": 59,
        "vision_start_token_id": 57,
        "vision_end_token_id": 60,
    },
    "qwen3_5_moe": {
        "text_config": {"model_type": "qwen3_5_moe_text", **_SHAPE, **_QWEN3_5_MOE},
        "vision_config": {**_QWEN_VISION, "model_type": "qwen3_5_moe_vision"},
        "image_token_id": 58,
        "video_token_id": 59,
        "vision_start_token_id": 57,
        "vision_end_token_id": 60,
    },
    "mistral3": {
        "text_config": {"model_type": "ministral3", **_SHAPE, **_SETTINGS["ministral3"]},
        "vision_config": _PIXTRAL,
        "tie_word_embeddings": False,
        "spatial_merge_size": 2,
        "image_token_index": 10,
    },
    "mistral3-of-mistral-v4": {
        "text_config": {**_SHAPE, "head_dim": 32, "rope_theta": 1e9, "sliding_window": None},
        "vision_config": _PIXTRAL,
        "tie_word_embeddings": False,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
    },
}


def _wrapped(variant: str, settings: dict[str, Any]) -> dict[str, Any]:
    model_type = model_type_of(variant)
    return {"model_type": model_type, "architectures": [WRAPPERS[model_type].architecture], **settings}


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: _described(name, settings) for name, settings in _SETTINGS.items()},
    **{name: _wrapped(name, settings) for name, settings in _WRAPPED.items()},
}
