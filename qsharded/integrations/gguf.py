"""GGUF: a Hugging Face checkpoint as one file for llama.cpp and what is built on it.

Names of keys are the ``gguf`` package's own. Rotary embedding pairs neighbours in llama.cpp's "llama" architecture and
halves in Hugging Face's: the rows of its q_proj and k_proj are put in the other order.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.integrations.gguf_tensors import GgufType, PlannedTensor, planned_tensors
from qsharded.integrations.gguf_tokenizer import add_tokenizer, check_tokenizer
from qsharded.models import ModelConfig
from qsharded.utils.durable_files import written_elsewhere
from qsharded.utils.untrusted_json import read_json

# A mistral without sliding windows computes what a llama does.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_ROPES = ("default", "linear", "llama3")
_FILE_TYPES = {
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "F32": gguf.LlamaFileType.ALL_F32,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def write_gguf(checkpoint: Path, target: Path, name: str, wanted: GgufType = "auto") -> None:
    """Write the model and tokenizer in ``checkpoint``, a folder of a Hugging Face model in 16 or 32 bits, to a file.

    One tensor at a time is in memory.

    Args:
        name: what the file says that the model is called.
        wanted: the matrices' type: "f16", "q8_0", "q4_0", or "auto" for the checkpoint's own.

    Raises:
        ValueError: as :func:`check_convertible`.
    """
    check_convertible(checkpoint, checkpoint)
    raw = read_json(checkpoint / "config.json")
    config, source = open_tied(checkpoint, ModelConfig.from_hf(raw))
    arch = _ARCHITECTURES[raw["model_type"]]
    plans = list(planned_tensors(config, arch, source, wanted))
    with written_elsewhere(target, sum(plan.nbytes for plan in plans)) as beside:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[arch])
        _describe(writer, config, name, _file_type(plans))
        add_tokenizer(writer, checkpoint, config.vocab_size)
        _write_plans(writer, plans)


def _file_type(plans: Sequence[PlannedTensor]) -> int:
    """The type of most weights."""
    elements: dict[str, int] = {}
    for plan in plans:
        elements[plan.type.name] = elements.get(plan.type.name, 0) + math.prod(plan.shape)
    return _FILE_TYPES[max(elements, key=lambda kind: elements[kind])]


def _write_plans(writer: Any, plans: Sequence[PlannedTensor]) -> None:
    for plan in plans:
        plan.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for plan in plans:
        writer.write_tensor_data(plan.values())
    writer.close()


def check_convertible(checkpoint: Path, tokenizer: Path) -> None:
    """Look at config.json and the tokenizer alone, before any weight is read.

    Raises:
        ValueError: something that llama.cpp would compute otherwise: sliding windows, a rotary embedding stretched in a
            way that is not written, a tokenizer that is not byte-level BPE, or one whose pre-tokenizer is unknown.
    """
    described = read_json(checkpoint / "config.json")
    config = ModelConfig.from_hf(described)
    if described["model_type"] not in _ARCHITECTURES:
        raise ValueError(
            f"model_type {described['model_type']!r} is not written to GGUF; {', '.join(_ARCHITECTURES)} are. Merge to "
            "safetensors and use llama.cpp's convert_hf_to_gguf.py"
        )
    _refuse_windows(config)
    if config.rope.rope_type not in _ROPES:
        raise ValueError(f"rope_type {config.rope.rope_type!r} is not written to GGUF; {', '.join(_ROPES)} are")
    check_tokenizer(tokenizer)


def _refuse_windows(config: ModelConfig) -> None:
    windows = {window for window in config.layer_windows if window is not None}
    if windows and min(windows) < config.max_position_embeddings:
        raise ValueError(
            f"the model attends to the latest {min(windows)} tokens alone in some layers (sliding_window), which "
            "llama.cpp does not do for this architecture"
        )


def _describe(writer: Any, config: ModelConfig, name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    if config.rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
