"""Which base weights a run, an adapter or a packed checkpoint belongs to: recorded, read, and compared.

A checkpoint in 4 bits has two identities: its own bytes, and the weights in 16 bits that it was packed from. It and its
original serve the same adapters.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.adapter import WEIGHTS_FILE, open_weights
from qsharded.checkpoint.calibration_record import NEAREST, CalibrationRecord
from qsharded.checkpoint.files import write_json
from qsharded.checkpoint.fingerprint import Fingerprint, is_packed
from qsharded.utils.untrusted_json import (
    ANY,
    BOOLEAN,
    NULL,
    as_object,
    check,
    map_of,
    object_of,
    parse,
    read_json,
    require,
    text,
)

ORIGIN_FILE = "qsharded_base.json"  # in a packed checkpoint's folder
BASE_KEY = "qsharded_base"  # in the metadata of an adapter's safetensors file
_PARTS = {"config": map_of(ANY, 1 << 12), "tensors": map_of(text(64), 1 << 20)}
_FINGERPRINT = object_of(_PARTS, *_PARTS, alone=True)
_IDENTITY = {"own": _FINGERPRINT, "packed": BOOLEAN, "made_from": _FINGERPRINT | NULL}


@dataclass(frozen=True)
class BaseIdentity:
    """The base weights that something was made with.

    Attributes:
        own: of the checkpoint that was given.
        packed: whether that is in 4 bits.
        made_from: of the checkpoint in 16 bits that it was packed from; None where that is not known.
        rounding: "nearest", or what a calibration calls its own.
    """

    own: Fingerprint
    packed: bool = False
    made_from: Fingerprint | None = None
    rounding: str = NEAREST

    @classmethod
    def of(cls, folder: Path) -> "BaseIdentity":
        """Of the checkpoint in ``folder``.

        Raises:
            ValueError: it is damaged, or is no longer what ``qsharded.quantize`` wrote.
        """
        own = Fingerprint.of(folder)
        if not is_packed(folder):
            return cls(own)
        record = CalibrationRecord.read(folder)
        return cls(own, True, _read_origin(folder, own), record.rounding if record else NEAREST)

    @classmethod
    def of_random(cls, folder: Path, seed: int, device: torch.device) -> "BaseIdentity":
        """Of weights drawn in the shape that config.json in ``folder`` gives."""
        return cls(Fingerprint.of_random(folder, seed, device))

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> "BaseIdentity":
        """What :meth:`to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        require(read, _IDENTITY, "no fingerprint of a base model")
        origin, said = read["made_from"], read.get("rounding", NEAREST)  # older versions knew no other
        check({"rounding": said}, {"rounding": text(128)}, "no fingerprint of a base model")
        return cls(Fingerprint(**read["own"]), read["packed"], Fingerprint(**origin) if origin else None, said)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    @property
    def in_16_bits(self) -> Fingerprint | None:
        """Of the weights before they were packed."""
        return self.made_from if self.packed else self.own

    def difference(self, now: "BaseIdentity", folder: Path) -> str | None:
        """In words, where ``now``, which is that of ``folder``, is another base than this; None where it is the same.

        Raises:
            CannotTell: one is packed from a checkpoint that is not known.
        """
        if self.own.difference(now.own, folder) is None:
            return None
        if self.in_16_bits is not None and now.in_16_bits is not None:
            return self.in_16_bits.difference(now.in_16_bits, folder)
        if self.packed and now.packed and self.in_16_bits is now.in_16_bits is None:
            return self.own.difference(now.own, folder)
        if other := self.own.config_difference(now.own):
            return other
        raise CannotTell("a checkpoint in 4 bits does not say which weights it was packed from")


class CannotTell(Exception):
    """Two bases cannot be compared; the message says why."""


def write_origin(original: Path, packed: Path) -> None:
    """Have the checkpoint in ``packed`` say that it was made from the one in ``original``."""
    both = {"packed": asdict(Fingerprint.of(packed)), "made_from": asdict(Fingerprint.of(original))}
    write_json(packed / ORIGIN_FILE, both)


def _read_origin(folder: Path, own: Fingerprint) -> Fingerprint | None:
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    read = read_json(path)
    both = dict.fromkeys(("packed", "made_from"), _FINGERPRINT)
    require(read, both, f"{path} is damaged; quantize the original again")
    written, origin = Fingerprint(**read["packed"]), Fingerprint(**read["made_from"])
    if changed := written.difference(own, folder):
        raise ValueError(
            f"{folder} was changed after it was packed: {changed}. Quantize the original again, or delete "
            f"{ORIGIN_FILE} to use it as another model"
        )
    return origin


def base_metadata(base: Mapping[str, Any]) -> dict[str, str]:
    """What an adapter's safetensors file says of its base, for :func:`base_of_adapter` to read.

    It stands there and not in adapter_config.json, where PEFT warns of keys that it does not know, or in a file of its
    own, which a copy or a later save would leave behind.
    """
    return {BASE_KEY: json.dumps(base)} if base else {}


def base_of_adapter(folder: Path) -> BaseIdentity | None:
    """The base that an adapter says it was trained on; None where it does not say, as PEFT's do not.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / WEIGHTS_FILE
    with open_weights(path) as file:
        said = (file.metadata() or {}).get(BASE_KEY)
    if said is None:
        return None
    try:
        return BaseIdentity.from_json(as_object(parse(said.encode(), BASE_KEY), BASE_KEY))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its {BASE_KEY} is {error}") from None
