"""GGUF: a Hugging Face checkpoint as one file for llama.cpp and what is built on it.

Names of tensors and keys are the ``gguf`` package's own. Matrices keep the checkpoint's dtype (BF16, F16 or F32),
vectors become F32 as llama.cpp wants them. Rotary embedding pairs neighbours in llama.cpp's "llama" architecture and
halves in Hugging Face's: the rows of its q_proj and k_proj are put in the other order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.checkpoint.tied_embeddings import HEAD, open_tied
from qsharded.integrations.gguf_tokenizer import add_tokenizer, check_tokenizer
from qsharded.models import ModelConfig
from qsharded.models.rope import frequency_divisors
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
_RECOMPUTED = ".rotary_emb.inv_freq"  # old checkpoints hold it
_FILE_TYPES = {
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.float32: gguf.LlamaFileType.ALL_F32,
}


def write_gguf(checkpoint: Path, target: Path, name: str) -> None:
    """Write the model and tokenizer in ``checkpoint``, a folder of a Hugging Face model in 16 or 32 bits, to a file.

    One tensor at a time is in memory.

    Args:
        name: what the file says that the model is called.

    Raises:
        ValueError: as :func:`check_convertible`.
    """
    check_convertible(checkpoint, checkpoint)
    raw = read_json(checkpoint / "config.json")
    config, source = open_tied(checkpoint, ModelConfig.from_hf(raw))
    arch = _ARCHITECTURES[raw["model_type"]]
    plans = list(_plans(config, arch, source))
    with written_elsewhere(target, sum(plan.nbytes for plan in plans)) as beside:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[arch])
        _describe(writer, config, name, max(_FILE_TYPES[plan.dtype] for plan in plans))
        add_tokenizer(writer, checkpoint, config.vocab_size)
        _write_plans(writer, plans)


def _write_plans(writer: Any, plans: "Sequence[_Plan]") -> None:
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


@dataclass(frozen=True)
class _Plan:
    """A tensor of the file; ``read`` gives its values, in any dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def announce(self, writer: Any) -> None:
        """Its name, shape and dtype; BF16, which numpy lacks, as bytes."""
        if self.dtype == torch.bfloat16:
            shape = (*self.shape[:-1], self.shape[-1] * 2)
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor_info(self.name, shape, np.dtype(np.uint8), math.prod(shape), bf16)
        else:
            dtype = np.dtype(str(self.dtype).removeprefix("torch."))
            writer.add_tensor_info(self.name, self.shape, dtype, self.nbytes)

    def values(self) -> np.ndarray:
        tensor = self.read().to(self.dtype).contiguous()
        return (tensor.view(torch.uint8) if self.dtype == torch.bfloat16 else tensor).numpy()


def _plans(config: ModelConfig, arch: Any, source: SafetensorsFolder) -> Iterator[_Plan]:
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    permuted = heads if arch == gguf.MODEL_ARCH.LLAMA else {}
    for stored in source.names():
        if stored.endswith(_RECOMPUTED) or (stored == HEAD and config.tie_word_embeddings):
            continue
        name, shape = names.get_name(stored, try_suffixes=(".weight", ".bias")), source.shape(stored)
        if name is None:
            raise ValueError(f"{stored} has no name in GGUF's architecture {gguf.MODEL_ARCH_NAMES[arch]}")
        dtype = source.rows(stored, 0, 0).dtype if len(shape) > 1 else torch.float32
        yield _Plan(name, shape, dtype, partial(_rows, source, stored, permuted.get(stored.split(".")[-2])))
    if config.rope.rope_type == "llama3":
        divisors = frequency_divisors(config.rope, config.head_dim)
        yield _Plan("rope_freqs.weight", tuple(divisors.shape), torch.float32, lambda: divisors)


def _rows(source: SafetensorsFolder, name: str, heads: int | None) -> Tensor:
    rows = source.rows(name, 0, source.shape(name)[0])
    return rows if heads is None else neighbours_paired(rows, heads)


def neighbours_paired(rows: Tensor, heads: int) -> Tensor:
    """The rows [heads * head_dim, ...] of q or k, those that rotary embedding pairs (head_dim / 2 apart) in turn."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _describe(writer: Any, config: ModelConfig, name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
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
