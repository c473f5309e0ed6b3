"""Which keys of a config.json are read, which change nothing, and the refusal of all others."""

from collections.abc import Mapping, Set
from typing import Any

from qsharded.models.config_spellings import is_ignored

SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Without any of these there is no decoder; a family may have a default for them."""

# quantization_config says how the checkpoint is stored, not what it computes: checkpoint/packed_format.py reads it.
OTHER_KEYS_READ = frozenset(
    {
        *("model_type", "architectures", "quantization_config"),
        *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    }
)

# Bookkeeping, and defaults for generation: no value of these changes what the decoder computes.
_HARMLESS = frozenset(
    """
    _name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation
    transformers_version torch_dtype dtype use_cache initializer_range gradient_checkpointing pretraining_tp
    bos_token_id eos_token_id pad_token_id eod_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    prefix id2label label2id num_labels problem_type finetuning_task task_specific_params
    output_hidden_states output_attentions return_dict torchscript use_bfloat16 tf_legacy_loss is_decoder
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens max_sequence_length is_llama_config transformers.js_config unsloth_fixed unsloth_version
    cache_implementation auto_map keys_to_ignore_at_inference classifier_dropout router_aux_loss_coef
    aux_loss_alpha seq_aux
    """.split()  # noqa: SIM905  (as a list it would fill a page)
)
# Keys of which only these values leave the decoder as it is; a family may say otherwise.
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
    # a mixture of experts that is none, and dropout that is off
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), (0,)),
    "mlp_only_layers": ([],),
    "output_router_logits": (False,),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout"), (0,)),
}


def changes_the_model(key: str) -> bool:
    """Whether a key of config.json may change what is computed. How weights are stored does not."""
    return key not in _HARMLESS and key != "quantization_config"


def check_keys(values: Mapping[str, Any], read: Set[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Of a decoder's config.json.

    Args:
        values: with the defaults of its family.
        read: keys that the family reads.
        neutral: the family's own values that change nothing, by key.

    Raises:
        ValueError: a key of ``SHAPE_KEYS`` is missing, or a key is unknown or holds a value that is not computed.
    """
    for key in SHAPE_KEYS:
        if values.get(key) is None:
            raise ValueError(f"the checkpoint's config has no {key!r}")
    for key in sorted(values.keys() - read - OTHER_KEYS_READ - _HARMLESS - set(SHAPE_KEYS)):
        _check_neutral(key, values[key], {**_NEUTRAL, **neutral})


def _check_neutral(key: str, value: Any, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    if value is None or value in neutral.get(key, ()) or is_ignored(key, value):  # null: "not set"
        return
    if key in neutral:
        raise ValueError(
            f"config key {key!r} is {value!r}; only {neutral[key][0]!r} is supported (--ignore-config-key {key} "
            "computes as if it were that)"
        )
    raise ValueError(
        f"config key {key!r} ({value!r}) is not known and may change what the model computes; "
        f"--ignore-config-key {key} passes over it, if you are sure that it does not"
    )
