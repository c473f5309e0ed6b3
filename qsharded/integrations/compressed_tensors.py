"""compressed-tensors: a checkpoint whose linear layers have 4 bits a weight (W4A16), in the form that vLLM reads.

The ``compressed-tensors`` package describes the form, chooses scales and packs. Weights are rounded to nearest, each
group of a row with a scale of its own, the largest weight of the group over 7.5. The head, the embedding, norms and
biases stay as they are, as in what LLM Compressor writes by the same scheme.

Axes: N = out_features, K = in_features, G = groups of a row.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from torch import Tensor, nn

from qsharded.checkpoint.computed_weights import ComputedWeights
from qsharded.checkpoint.files import TensorParts, write_json, write_tensors
from qsharded.checkpoint.load import checkpoint_name, skeleton
from qsharded.checkpoint.source import INDEX, SafetensorsFolder
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.models import ModelConfig
from qsharded.models.parts import part_names
from qsharded.utils import heartbeat
from qsharded.utils.untrusted_json import read_json

_FORMAT, _KEY = "pack-quantized", "quantization_config"
_GROUPS = (128, 64, 32)  # the sizes that vLLM's kernels take, the usual one first
_PER_WORD = 8  # weights in an int32
_ELEMENTS_AT_ONCE = 1 << 24


def check_convertible(checkpoint: Path) -> None:
    """Look at config.json alone, before any weight is read.

    Raises:
        ValueError: a model whose layers are not all known here by their names in vLLM.
    """
    config = ModelConfig.from_hf(read_json(checkpoint / "config.json"))
    if config.mixture:
        raise ValueError(
            "--format compressed-tensors does not pack mixtures of experts; merge to safetensors and use LLM Compressor"
        )
    if config.wrapper:
        raise ValueError(
            "--format compressed-tensors is for models of text alone, this one has other parts too; merge to "
            "safetensors and use LLM Compressor"
        )


def pack_in_place(folder: Path) -> None:
    """Pack the linear layers of the checkpoint in ``folder``, in 16 or 32 bits, file by file.

    A file is replaced when its successor is complete; of a tensor a few rows at once are in memory.

    Raises:
        NotWritten: the disk did not let it.
    """
    described = read_json(folder / "config.json")
    packing, files = _Packing.of(folder, described), SafetensorsFolder(folder).all_parts()
    index: dict[str, str] = {}
    for path in files.files():
        stored = [name for name in files.names() if files.file_of(name) == path]
        parts = {name: part for one in stored for name, part in packing.parts(files, one).items()}
        write_tensors(path, parts, {"format": "pt"})
        index |= dict.fromkeys(parts, path.relative_to(folder).as_posix())
    if files.index is not None:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": index})
    write_json(folder / "config.json", described | {_KEY: packing.described()})


@dataclass(frozen=True)
class _Packing:
    """Which tensors are packed, by their names in the files, how, and which layers are not."""

    scheme: QuantizationScheme
    packed: frozenset[str]
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, described: dict[str, Any]) -> "_Packing":
        config, source = open_tied(folder, ModelConfig.from_hf(described))
        model = skeleton(config, None, torch.float32, quant_format=None)
        head = part_names(model).head
        found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        linears = {name: module.in_features for name, module in found.items() if name != head}
        size = max(_GROUPS, key=lambda group: sum(K % group == 0 for K in linears.values()))
        scheme = preset_name_to_scheme("W4A16", ["Linear"])
        scheme.weights.group_size = size
        names = {name: source.name_in_files(checkpoint_name(f"{name}.weight")) for name in linears}
        packed = frozenset(names[name] for name, K in linears.items() if K % size == 0)
        left = sorted(stored.removesuffix(".weight") for stored in names.values() if stored not in packed)
        return cls(scheme, packed, (head, *left))

    def described(self) -> dict[str, Any]:
        """What config.json says of it."""
        config = QuantizationConfig(
            config_groups={"group_0": self.scheme},
            quant_method="compressed-tensors",
            format=_FORMAT,
            quantization_status="compressed",
            ignore=list(self.ignored),
        )
        plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
        return plain

    def parts(self, files: SafetensorsFolder, name: str) -> dict[str, TensorParts]:
        """What stands in the place of the tensor ``name``."""
        shape, dtype = files.shape(name), files.dtype(name)
        if name not in self.packed:
            return {name: TensorParts(dtype, shape, _once(partial(files.whole, name)))}
        N, K = shape
        group = self.scheme.weights.group_size
        return {
            f"{name}_packed": TensorParts(torch.int32, (N, K // _PER_WORD), self._packed(files, name)),
            f"{name}_scale": TensorParts(dtype, (N, K // group), self._scales(files, name)),
            f"{name}_shape": TensorParts(torch.int64, (2,), [torch.tensor(shape)]),
        }

    def _scales(self, files: SafetensorsFolder, name: str) -> Iterator[Tensor]:
        return (self._scale(rows_NK) for rows_NK in _row_by_row(files, name))

    def _scale(self, rows_NK: Tensor) -> Tensor:
        """[N, G], rounded to what it is stored in."""
        groups = rows_NK.float().unflatten(-1, (-1, self.scheme.weights.group_size))
        scale_NG, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), self.scheme.weights)
        return scale_NG.to(rows_NK.dtype)

    def _packed(self, files: SafetensorsFolder, name: str) -> Iterator[Tensor]:
        for rows_NK in _row_by_row(files, name):
            heartbeat.beat("packing weights")
            state = {"weight": rows_NK.float(), "weight_scale": self._scale(rows_NK).float()}
            yield _compressor().compress(state, self.scheme)["weight_packed"]


def _compressor() -> Any:
    return BaseCompressor.get_value_from_registry(_FORMAT)


def _once(read: Callable[[], Tensor]) -> Iterator[Tensor]:
    yield read()


def _row_by_row(files: SafetensorsFolder, name: str) -> Iterator[Tensor]:
    N, K = files.shape(name)
    step = max(1, _ELEMENTS_AT_ONCE // K)
    return (files.rows(name, first, first + step) for first in range(0, N, step))


def compressed_weights(folder: Path, source: SafetensorsFolder) -> ComputedWeights:
    """The weights of a folder that :func:`pack_in_place` has packed, decompressed by the package.

    Args:
        source: the folder's files as they were before.
    """
    scheme = QuantizationConfig(**read_json(folder / "config.json")[_KEY]).config_groups["group_0"]
    files = {path: safe_open(path, framework="pt") for path in source.files()}
    holder = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118

    def read(here: str) -> Tensor:
        name = _name_in_files(source, here)
        if name in holder:
            return holder[name].get_tensor(name).float()
        ends = ("packed", "scale", "shape")
        state = {f"weight_{end}": holder[f"{name}_{end}"].get_tensor(f"{name}_{end}") for end in ends}
        weight: Tensor = _compressor().decompress(state, scheme)["weight"]
        return weight.float()

    return ComputedWeights(read)


def _name_in_files(source: SafetensorsFolder, here: str) -> str:
    if source.renamed is not None and here == source.renamed[1]:
        return source.renamed[0]
    return source.name_in_files(here)
