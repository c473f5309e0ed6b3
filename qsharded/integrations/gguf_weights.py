"""The weights of a GGUF file that :mod:`qsharded.integrations.gguf` has written, as a checkpoint calls them."""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from qsharded.checkpoint.computed_weights import ComputedWeights
from qsharded.integrations.gguf_tensors import halves_paired, permuted_heads
from qsharded.models import ModelConfig


def gguf_weights(path: Path, config: ModelConfig) -> ComputedWeights:
    """Each dequantized by the ``gguf`` package, its rows in the order that a checkpoint has them in.

    Args:
        config: the model's.
    """
    reader = gguf.GGUFReader(path)
    arch = _arch(reader)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name  # it was written under that name
        tensor = stored[called]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = permuted_heads(name, config, arch)
        return values if heads is None else halves_paired(values, heads)

    return ComputedWeights(read)


def _arch(reader: Any) -> Any:
    said = reader.fields["general.architecture"].contents()
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == said)
