"""Fingerprints of base models: whether two folders hold the same weights, whatever their paths and their files' sizes.

An adapter is an update to particular weights. Other weights of the same shapes take it without an error and answer
nonsense, so runs, adapters and packed checkpoints record which ones they were made from.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.packed_format import read_storage_format
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.models import ModelConfig
from qsharded.models.config_keys import changes_the_model
from qsharded.utils.untrusted_json import read_json

_SAMPLE = 1 << 16  # bytes read at each place of a large tensor
_PLACES = 16
_READERS = 8  # a network file system answers several requests in the time of one
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RECOMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Fingerprint:
    """What a base model computes and with which weights.

    It takes all bytes of a tensor of up to 1 MiB, and of larger ones 64 KiB at each of 16 places from the first byte to
    the last: 0.6 GB of a checkpoint of 140 GB. Fine-tuned, merged, converted and pruned weights differ everywhere, so
    they are told from the original. What it does not see is a change of a few rows of a large tensor that lie between
    the places. It does not depend on how tensors are cut into files.

    Attributes:
        config: what config.json says that changes the mathematics, by the names of :class:`ModelConfig`.
        tensors: name -> hash of dtype, shape and sampled bytes.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> "Fingerprint":
        """Of the checkpoint in ``folder``.

        Raises:
            ValueError: a file that is missing, damaged or cut off, or a config.json that is not read here.
        """
        source = SafetensorsFolder(folder)
        names = [name for name in source.names() if not name.endswith(_RECOMPUTED)]
        with ThreadPoolExecutor(_READERS) as readers:
            tensors = dict(zip(names, readers.map(lambda name: _tensor_hash(source, name), names), strict=True))
        return cls(_mathematics(folder), _tied_once(tensors))

    @classmethod
    def of_random(cls, folder: Path, seed: int, device: torch.device) -> "Fingerprint":
        """Of weights drawn in the shape that config.json in ``folder`` gives."""
        return cls(_mathematics(folder), {f"random weights (seed {seed}, drawn on {device.type})": ""})

    def difference(self, now: "Fingerprint", folder: Path) -> str | None:
        """In words, where ``now``, which is that of ``folder``, differs from this; None where it does not."""
        if other := self.config_difference(now):
            return other
        if missing := sorted(self.tensors.keys() - now.tensors.keys()):
            return f"it lacks {_listed(missing)}"
        if surplus := sorted(now.tensors.keys() - self.tensors.keys()):
            return f"it holds {_listed(surplus)} too"
        changed = sorted(name for name, digest in self.tensors.items() if now.tensors[name] != digest)
        if not changed:
            return None
        return f"{len(changed)} of {len(now.tensors)} tensors differ, the first is {_place(folder, changed[0])}"

    def config_difference(self, now: "Fingerprint") -> str | None:
        """The same of config.json alone. Another version of qsharded may know more or fewer of its keys."""
        for key in sorted(self.config.keys() & now.config.keys()):
            if self.config[key] != now.config[key]:
                return f"config.json's {key} is {now.config[key]!r}, it was {self.config[key]!r}"
        return None


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _place(folder: Path, name: str) -> str:
    """The tensor, and where it is in a file."""
    source = SafetensorsFolder(folder)
    return f"{name} in {source.file_of(name).name}" if name in source.names() else name


def _tied_once(tensors: dict[str, str]) -> dict[str, str]:
    """A tied weight is saved under both of its names or under either; here it has the embedding's."""
    head = tensors.get(_HEAD)
    if head is not None and tensors.get(_EMBEDDING, head) == head:
        return {name: digest for name, digest in tensors.items() if name != _HEAD} | {_EMBEDDING: head}
    return tensors


def _tensor_hash(source: SafetensorsFolder, name: str) -> str:
    digest = hashlib.sha256(f"{source.dtype(name)} {source.shape(name)}".encode())
    for first, size in _samples(source.nbytes(name)):
        raw = torch.empty(size, dtype=torch.uint8)
        source.read_into(name, first, raw)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def _samples(nbytes: int) -> Iterator[tuple[int, int]]:
    """(first byte, number of bytes) of what is read of a tensor."""
    if nbytes <= _SAMPLE * _PLACES:
        yield 0, nbytes
        return
    for place in range(_PLACES):
        yield (nbytes - _SAMPLE) * place // (_PLACES - 1), _SAMPLE


def _mathematics(folder: Path) -> dict[str, Any]:
    """config.json's part in what is computed, flat, with the values that JSON gives back."""
    described = read_json(folder / "config.json")
    try:
        config = asdict(ModelConfig.from_hf(described))
    except ValueError:  # transformers' code computes it, and reads it in its own way
        return {key: value for key, value in described.items() if changes_the_model(key)}
    del config["max_position_embeddings"]  # a limit; where rotations depend on it, it is rope's original_length
    rope = config.pop("rope")
    for one in (rope, *config["layer_ropes"]):
        if one and one["rope_type"] in ("default", "linear", "ntk-alpha"):
            one.pop("original_length", None)
    flat: dict[str, Any] = json.loads(json.dumps(config | {f"rope.{key}": value for key, value in rope.items()}))
    return flat


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint's weights are in 4 bits already."""
    return read_storage_format(read_json(folder / "config.json")) is not None
