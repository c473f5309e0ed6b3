"""Layers that are done, each in a file of its own, so that a run that was stopped goes on behind the last of them."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qsharded.checkpoint.files import TensorParts, write_json, write_tensors
from qsharded.checkpoint.packed_format import ABSMAX, OFFSET, SCALES
from qsharded.quant.experts import AnyPackedWeight, PackedExpertWeights
from qsharded.quant.formats import QuantFormat
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils.untrusted_json import read_json

_RECORD = "calibration.json"
_COUNTS = "counts"  # of a file's metadata


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

    def put(self, layer: int, weights: Mapping[str, AnyPackedWeight], counts: Mapping[str, int]) -> None:
        """Keep a layer's weights, by their names in the checkpoint, and what :meth:`counts` adds up."""
        tensors: dict[str, Tensor] = {}
        for name, packed in weights.items():
            endings = zip(("", ABSMAX, SCALES, OFFSET), packed.tensors, strict=True)
            tensors |= {name + ending: part.cpu() for ending, part in endings if part is not None}
        parts = {name: TensorParts(t.dtype, tuple(t.shape), [t]) for name, t in tensors.items()}
        write_tensors(self._path(layer), parts, {"format": "pt", _COUNTS: json.dumps(counts)})

    def get(self, layer: int, device: torch.device) -> dict[str, AnyPackedWeight]:
        """The weights that :meth:`put` kept."""
        with safe_open(self._path(layer), framework="pt", device=str(device)) as file:
            return {name: self._read(file, name) for name in _names(file)}

    def weight(self, name: str) -> AnyPackedWeight | None:
        """One weight of any layer, on the CPU; None where there is none of that name."""
        layer = self._layer_of.get(name)
        if layer is None:
            return None
        with safe_open(self._path(layer), framework="pt") as file:
            return self._read(file, name)

    def counts(self) -> dict[str, int]:
        """The sums of what the layers counted, once all are done."""
        total: Counter[str] = Counter()
        for path in self._layers():
            with safe_open(path, framework="pt") as file:
                total.update(json.loads(file.metadata()[_COUNTS]))
        return dict(total)

    def _read(self, file: Any, name: str) -> AnyPackedWeight:
        codes, absmax, scales, offset = (file.get_tensor(name + ending) for ending in ("", ABSMAX, SCALES, OFFSET))
        kind = PackedExpertWeights if codes.dim() == 3 else PackedWeight
        return kind(codes, absmax, scales, offset, self._quant_format)

    @cached_property
    def _layer_of(self) -> dict[str, int]:
        """name -> layer, once all are done."""
        found: dict[str, int] = {}
        for path in self._layers():
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(_names(file), int(path.stem.removeprefix("layer-")))
        return found

    def remove(self) -> None:
        """All of it, once it stands elsewhere."""
        shutil.rmtree(self._folder)

    def _layers(self) -> Iterator[Path]:
        return self._folder.glob("layer-*.safetensors")

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.safetensors"


def _names(file: Any) -> list[str]:
    """Of the weights in an open file of a layer."""
    return [name.removesuffix(ABSMAX) for name in file.offset_keys() if name.endswith(ABSMAX)]
