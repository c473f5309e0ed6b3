"""Layers that are done, each in a file of its own, so that a run that was stopped goes on behind the last of them."""

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qsharded.checkpoint.files import TensorParts, write_json, write_tensors
from qsharded.checkpoint.packed_format import ABSMAX, OFFSET, SCALES
from qsharded.quant.formats import QuantFormat
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils.untrusted_json import read_json

_RECORD = "calibration.json"


class LayerStore:
    """A folder of packed weights, for one base, rows and method.

    Args:
        folder: its own.
        quant_format: of the weights.
    """

    def __init__(self, folder: Path, quant_format: QuantFormat) -> None:
        self._folder, self._quant_format = folder, quant_format

    def begin(self, record: Mapping[str, Any]) -> None:
        """Make the folder. What is left there of a run with another ``record``, values of JSON, is removed."""
        path = self._folder / _RECORD
        if path.is_file() and read_json(path) != record:
            shutil.rmtree(self._folder)
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(path, record)

    def has(self, layer: int) -> bool:
        """Whether it is done."""
        return self._path(layer).is_file()

    def put(self, layer: int, weights: Mapping[str, PackedWeight]) -> None:
        """Keep a layer's weights, by their names in the checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, packed in weights.items():
            endings = zip(("", ABSMAX, SCALES, OFFSET), packed.tensors, strict=True)
            tensors |= {name + ending: part.cpu() for ending, part in endings if part is not None}
        parts = {name: TensorParts(t.dtype, tuple(t.shape), [t]) for name, t in tensors.items()}
        write_tensors(self._path(layer), parts, {"format": "pt"})

    def get(self, layer: int, device: torch.device) -> dict[str, PackedWeight]:
        """What :meth:`put` kept."""
        read = load_file(self._path(layer), device=str(device))
        names = [name.removesuffix(ABSMAX) for name in read if name.endswith(ABSMAX)]
        return {
            name: PackedWeight(
                read[name], read[name + ABSMAX], read[name + SCALES], read[name + OFFSET], self._quant_format
            )
            for name in names
        }

    def weight(self, name: str) -> PackedWeight | None:
        """One weight of any layer, on the CPU; None where there is none of that name."""
        layer = self._layer_of.get(name)
        return None if layer is None else self.get(layer, torch.device("cpu"))[name]

    @cached_property
    def _layer_of(self) -> dict[str, int]:
        """name -> layer, once all are done."""
        found: dict[str, int] = {}
        for path in self._folder.glob("layer-*.safetensors"):
            with safe_open(path, framework="pt") as file:
                names = [name.removesuffix(ABSMAX) for name in file.offset_keys() if name.endswith(ABSMAX)]
            found |= dict.fromkeys(names, int(path.stem.removeprefix("layer-")))
        return found

    def remove(self) -> None:
        """All of it, once it stands elsewhere."""
        shutil.rmtree(self._folder)

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.safetensors"
