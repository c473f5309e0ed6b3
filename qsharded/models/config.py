"""What a checkpoint's config.json says about its decoder, read strictly: a key we do not know stops the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qsharded.models.rope import RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, under Hugging Face's names where these exist. SmolLM2 is a llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_windows: tuple[int | None, ...] = ()
    """Per layer, how many latest tokens (itself included) a token sees; None: all. Empty: all, in every layer."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_hidden_layers)
        if len(self.layer_windows) != self.num_hidden_layers:
            raise ValueError(f"layer_windows has {len(self.layer_windows)} entries for {self.num_hidden_layers} layers")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json as transformers 4 or 5 writes it (families: llama, mistral, qwen2, qwen3).

        Raises ValueError that names an unknown model type or architecture, a missing key, and any key that is unknown
        or holds a value this decoder does not compute.
        """
        family = _family(config)
        values = {**_DEFAULTS, **family.defaults, **config}
        _check_keys(values, family)
        heads = values["num_attention_heads"]
        attention_bias = bool(values.get("attention_bias"))
        # Every family agrees on null: as many key-value heads as heads, and heads that split the hidden size.
        return cls(
            **{key: values[key] for key in _SHAPE_KEYS},
            num_key_value_heads=values["num_key_value_heads"] or heads,
            head_dim=values["head_dim"] or values["hidden_size"] // heads,
            rms_norm_eps=values["rms_norm_eps"],
            tie_word_embeddings=values["tie_word_embeddings"],
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(values.get("mlp_bias")),
            qk_norm=family.qk_norm,
            rope=RopeConfig.from_hf(values),
            layer_windows=_layer_windows(values, family),
        )


@dataclass(frozen=True)
class _Family:
    """What one model type has beyond the common decoder. `defaults` are those of its transformers config class."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", defaults={"attention_bias": False, "mlp_bias": False}),
    "mistral": _Family("MistralForCausalLM", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True, defaults={"num_key_value_heads": 32, **_QWEN_WINDOWS}),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_QWEN_WINDOWS},
    ),
}

_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# quantization_config says how the checkpoint is stored, not what it computes: checkpoint/quantized.py reads it.
_OTHER_KEYS_READ = {
    "model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config",
}  # fmt: skip

# Bookkeeping, and defaults for generation: no value of these changes what the decoder computes.
_HARMLESS = frozenset(
    """
    _name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation
    transformers_version torch_dtype dtype use_cache initializer_range gradient_checkpointing pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    output_hidden_states output_attentions return_dict torchscript use_bfloat16 tf_legacy_loss is_decoder
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens max_sequence_length is_llama_config transformers.js_config unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905  (as a list it would fill a page)
)
# Keys of which only these values leave the decoder as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
}


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json names, as transformers reads it: torch_dtype is the older spelling."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return None if dtype is None else str(dtype)


def _family(config: Mapping[str, Any]) -> _Family:
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}")
    family = _FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise ValueError(
            f"architectures {architectures!r} is not supported; a {model_type} checkpoint must be a "
            f"{family.architecture}"
        )
    return family


def _check_keys(values: Mapping[str, Any], family: _Family) -> None:
    for key in _SHAPE_KEYS:
        if values.get(key) is None:
            raise ValueError(f"the checkpoint's config has no {key!r}")
    read = {*_SHAPE_KEYS, *_DEFAULTS, *family.defaults, *_OTHER_KEYS_READ}
    for key in sorted(values.keys() - read - _HARMLESS):
        _check_neutral(key, values[key])


def _check_neutral(key: str, value: Any) -> None:
    if value is None or value in _NEUTRAL.get(key, ()):  # null is how a config says "not set"
        return
    if key in _NEUTRAL:
        raise ValueError(f"config key {key!r} is {value!r}; only {_NEUTRAL[key][0]!r} is supported")
    raise ValueError(
        f"config key {key!r} ({value!r}) is not known and may change what the model computes; "
        f"remove it from config.json if you are sure that it does not"
    )


def _layer_windows(values: Mapping[str, Any], family: _Family) -> tuple[int | None, ...]:
    """Each layer's window. Mistral has one for all; Qwen names layers in layer_types, or counts max_window_layers."""
    layers = values["num_hidden_layers"]
    window = values.get("sliding_window")
    if "use_sliding_window" not in family.defaults:
        return (window if "sliding_window" in family.defaults else None,) * layers
    if not values["use_sliding_window"]:
        window = None
    first = values["max_window_layers"] if window else layers
    types = values["layer_types"] or ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    return tuple(_window_of(layer_type, window) for layer_type in types)


def _window_of(layer_type: str, window: int | None) -> int | None:
    if layer_type == "full_attention":
        return None
    if layer_type != "sliding_attention":
        raise ValueError(f"layer_types: {layer_type!r} is not supported (full_attention and sliding_attention are)")
    if window is None:
        raise ValueError("layer_types has sliding_attention, but use_sliding_window is false or sliding_window null")
    return window
