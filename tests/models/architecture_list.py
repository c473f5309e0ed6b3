"""Architectures that run through transformers' code in tests, and so in README and docs/models.md.

No more than data: what each needs beside the common shape of tiny models.
"""

from dataclasses import dataclass, field
from typing import Any

_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Architecture:
    """A model_type of transformers.

    Attributes:
        title: what its models are called.
        config: of a tiny one.
        packs: whether documents share a row; else each has one of its own, since layers carry something across them.
        is_native: there is code for it here, too.
    """

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    packs: bool = True
    is_native: bool = False


ARCHITECTURES = {
    "llama": Architecture("Llama", is_native=True),
    "qwen3": Architecture("Qwen3", is_native=True),
    "gemma3_text": Architecture("Gemma 3", _WINDOWS, is_native=True),
    "apertus": Architecture("Apertus"),
    "cohere2": Architecture("Cohere 2 (Command R7B, Command A)", _WINDOWS),
    "gemma4_text": Architecture(
        "Gemma 4 text",
        _WINDOWS | {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "global_head_dim": 32},
    ),
    "gpt_neox": Architecture("GPT-NeoX, Pythia"),
    "helium": Architecture("Helium"),
    "internlm3": Architecture("InternLM3"),
    "jais2": Architecture("Jais 2"),
    "llama4_text": Architecture("Llama 4 text", {"num_local_experts": 2}),
    "minicpm3": Architecture("MiniCPM3", {"num_key_value_heads": 4}),
    "nanochat": Architecture("nanochat"),
    "nemotron": Architecture("Nemotron, Minitron"),
    "phi": Architecture("Phi-1.5, Phi-2"),
    "stablelm": Architecture("StableLM 2"),
    "starcoder2": Architecture("StarCoder 2"),
    "qwen3_moe": Architecture("Qwen3 MoE", _EXPERTS | {"moe_intermediate_size": 32}, is_native=True),
    "mixtral": Architecture("Mixtral", {"num_local_experts": 4}, is_native=True),
    "gpt_oss": Architecture("gpt-oss", _WINDOWS | {"num_local_experts": 4, "num_experts_per_tok": 2}, is_native=True),
    "granitemoe": Architecture("Granite MoE", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": Architecture("OLMoE", _EXPERTS),
    "glm4_moe": Architecture("GLM-4.5", _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1}, is_native=True),
    "deepseek_v3": Architecture(
        "DeepSeek V3",
        _EXPERTS
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        | {"head_dim": 8, "num_key_value_heads": 4},
        is_native=True,
    ),
    "ernie4_5_moe": Architecture(
        "ERNIE 4.5 MoE",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "hunyuan_v1_moe": Architecture("Hunyuan MoE", {"num_experts": 4, "moe_topk": 2}),
    "bamba": Architecture("Bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16}, packs=False),
    "falcon_h1": Architecture(
        "Falcon H1",
        {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "ssm_multipliers": [0.5, 1.0, 2.0, 3.0, 4.0]},
        packs=False,
    ),
    "lfm2": Architecture("LFM2", {"layer_types": ["conv", "full_attention"]}, packs=False),
    "mpt": Architecture("MPT", packs=False),
    "qwen3_5_text": Architecture(
        "Qwen3.5 text", {"layer_types": ["linear_attention", "full_attention"]}, packs=False, is_native=True
    ),
}

SLOW = frozenset(
    "apertus gpt_neox jais2 nanochat phi qwen3_moe mixtral gpt_oss glm4_moe deepseek_v3 granitemoe lfm2 mpt "  # noqa: SIM905
    "ernie4_5_moe hunyuan_v1_moe qwen3_5_text".split()
)
"""Those that differ little from others here: they run with --slow."""
