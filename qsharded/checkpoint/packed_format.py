"""Checkpoints whose weights are packed already: ours, and those that transformers and bitsandbytes write.

A packed weight `[N, K]` called W (its name ends in ".weight") is, with G = K/64 (or over another size of blocks) and
S = ceil(N*G/256):

    qsharded                                    bitsandbytes (4 bits)
    W               uint8 [N, K/2]              W                uint8 [N*K/2, 1], or the same bytes in a float type
    W_absmax        uint8 [N, G]                W.absmax         uint8 [N*G]; fp32 where it is not nested
    W_absmax_scales fp32 [S]                    W.nested_absmax  fp32 [S], where it is nested
    W_absmax_offset fp32 []                     W.quant_state.bitsandbytes__nf4 (or fp4): JSON as uint8, with
                                                blocksize and nested_offset
                                                W.quant_map fp32 [16], W.nested_quant_map fp32 [256]

The experts of a mixture are packed in our form alone: W is then a projection of all of a layer's experts, whose E
matrices [N, K] lie below each other, uint8 [E*N, K/2] and [E*N, G], with W_absmax_scales [E, S] and W_absmax_offset
[E]; each is quantized by itself.

Bytes and their order are the same in both. config.json's quantization_config names the form and the codebook; the size
of the blocks stands there in our form, and beside each weight in bitsandbytes'. All weights of a checkpoint are of one
format. Ours too can do without double quantization ("double_quant": false): W_absmax is then uint8 [N, 4G], the bytes
of the fp32 values, and has no scales and offset. The quantize command does not write that; the integrations may.
"""

import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qsharded.checkpoint.safetensors_header import Spec
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.quant import blockwise8, formats
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.utils.untrusted_json import NULL, as_object, check, integer, list_of, number, parse, text

QUANT_METHOD, VERSION = "qsharded", 1
BITSANDBYTES, MXFP4 = "bitsandbytes", "mxfp4"
Form = Literal["qsharded", "bitsandbytes"]

CONFIG_KEY = "quantization_config"
ABSMAX, SCALES, OFFSET = "_absmax", "_absmax_scales", "_absmax_offset"
BNB_ABSMAX, BNB_NESTED, BNB_MAP, BNB_NESTED_MAP = ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map"
BNB_STATE = ".quant_state.bitsandbytes__"  # "nf4" or "fp4" follows
_BNB_TYPES = get_args(formats.QuantType)

_LONGEST_STATE = 1 << 16  # some 300 bytes are usual
_STATE = {
    "quant_type": text(16),
    "blocksize": integer(1, 1 << 20),
    "dtype": text(16),
    "shape": list_of(integer(0, 1 << 48), 2),
    "nested_blocksize": integer(1, 1 << 20) | NULL,
    "nested_dtype": text(16) | NULL,
    "nested_offset": number(-3e38, 3e38) | NULL,
}
_ORIGINAL = "give the 16-bit checkpoint it was made from"


@dataclass(frozen=True)
class StorageFormat:
    """How a checkpoint says that its weights are packed.

    Attributes:
        form: whose it is.
        double_quant: whether the blocks' maxima are in 8 bits rather than in fp32.
        quant_format: where bitsandbytes packed them, blocks of 64 until :meth:`as_stored` has looked.
    """

    form: Form
    double_quant: bool = True
    quant_format: QuantFormat = NF4_64

    def weights(self, source: SafetensorsFolder) -> set[str]:
        """The names of the packed weights.

        Raises:
            ValueError: there is none.
        """
        mark = ABSMAX if self.form == QUANT_METHOD else BNB_STATE + self.quant_format.quant_type
        names = {name.removesuffix(mark) for name in source.names() if name.endswith(mark)}
        if not names:
            said = f"{self.form}, {self.quant_format.quant_type}"
            raise ValueError(f"{source.folder}: config.json speaks of packed weights ({said}), but there is none")
        return names

    def as_stored(self, source: SafetensorsFolder, name: str) -> "StorageFormat":
        """This, with the blocks' size, which bitsandbytes notes beside each packed weight: here beside ``name``.

        Raises:
            ValueError: there is no such size.
        """
        if self.form == QUANT_METHOD:
            return self
        state = _bitsandbytes_state(source, name, self.quant_format.quant_type)
        try:
            return replace(self, quant_format=QuantFormat(self.quant_format.quant_type, state.get("blocksize", 0)))
        except ValueError as error:
            raise ValueError(f"{source.file_of(name)}: {name}: {error}; {_ORIGINAL}") from None

    def tensors(self, name: str) -> set[str]:
        """What the checkpoint holds for the packed weight ``name``."""
        if self.form == QUANT_METHOD:
            second_level = (SCALES, OFFSET) if self.double_quant else ()
            return {name + ending for ending in ("", ABSMAX, *second_level)}
        nested = (BNB_NESTED, BNB_NESTED_MAP) if self.double_quant else ()
        return {
            name + ending for ending in ("", BNB_ABSMAX, BNB_STATE + self.quant_format.quant_type, BNB_MAP, *nested)
        }

    def parts(self, source: SafetensorsFolder, name: str, N: int, K: int) -> "PackedTensors":
        """Where the parts of the packed weight ``name`` [N, K] are found.

        Raises:
            ValueError: they are of another size or format; the tensor is named.
        """
        parts = self._own(source, name) if self.form == QUANT_METHOD else self._of_bitsandbytes(source, name, N, K)
        _check_bytes(source, parts.codes, N * K // 2)
        values = N * K // self.quant_format.block_size
        if not self.double_quant:
            dtype = torch.uint8 if self.form == QUANT_METHOD else torch.float32
            _check_kind(source, parts.absmax, dtype, values * torch.float32.itemsize // dtype.itemsize)
            return parts
        _check_kind(source, parts.absmax, torch.uint8, values)
        assert parts.scales is not None
        _check_kind(
            source, parts.scales, torch.float32, formats.second_level_blocks(N, K // self.quant_format.block_size)
        )
        return parts

    def expert_parts(self, source: SafetensorsFolder, name: str, E: int, N: int, K: int) -> "PackedExpertTensors":
        """Where the parts of the packed matrices ``name`` of E experts are found, each [N, K].

        Raises:
            ValueError: they are of another size, or not in the one form that holds experts.
        """
        if self.form != QUANT_METHOD or not self.double_quant:
            raise ValueError(
                f"{source.folder}: experts are packed in qsharded's form alone, double-quantized; {_ORIGINAL}"
            )
        G = K // self.quant_format.block_size
        _check_bytes(source, name, E * N * K // 2)
        _check_kind(source, name + ABSMAX, torch.uint8, E * N * G)
        _check_kind(source, name + SCALES, torch.float32, E * formats.second_level_blocks(N, G))
        _check_kind(source, name + OFFSET, torch.float32, E)
        return PackedExpertTensors(name, name + ABSMAX, name + SCALES, name + OFFSET)

    def _own(self, source: SafetensorsFolder, name: str) -> "PackedTensors":
        if not self.double_quant:
            return PackedTensors(name, name + ABSMAX, None, None)
        _check_kind(source, name + OFFSET, torch.float32, 1)
        offset = _finite(source, name, source.whole(name + OFFSET).item())
        return PackedTensors(name, name + ABSMAX, name + SCALES, offset)

    def _of_bitsandbytes(self, source: SafetensorsFolder, name: str, N: int, K: int) -> "PackedTensors":
        quant_type = self.quant_format.quant_type
        state = _bitsandbytes_state(source, name, quant_type)
        _require(source, name, "quant_type", state, quant_type)
        _require(source, name, "blocksize", state, self.quant_format.block_size)  # that of the first weight
        _require(source, name, "shape", state, [N, K])
        _check_map(source, name + BNB_MAP, formats.codebook(quant_type=quant_type))
        if not self.double_quant:
            return PackedTensors(name, name + BNB_ABSMAX, None, None)
        _require(source, name, "nested_blocksize", state, blockwise8.BLOCK)
        _check_map(source, name + BNB_NESTED_MAP, blockwise8.dynamic_map())
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float):
            raise ValueError(f"{source.file_of(name)}: {name} has nested_offset {offset!r}, not a number")
        return PackedTensors(name, name + BNB_ABSMAX, name + BNB_NESTED, _finite(source, name, float(offset)))


def _finite(source: SafetensorsFolder, name: str, offset: float) -> float:
    if not math.isfinite(offset):
        raise ValueError(
            f"{source.file_of(name)}: the offset of {name}'s scales is {offset}; the checkpoint is damaged"
        )
    return offset


@dataclass(frozen=True)
class PackedTensors:
    """The tensors of a packed weight. Without double quantization there are no scales and no offset."""

    codes: str
    absmax: str
    scales: str | None
    offset: float | None


@dataclass(frozen=True)
class PackedExpertTensors:
    """The tensors of the packed matrices of experts."""

    codes: str
    absmax: str
    scales: str
    offset: str


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint whose weights are packed already, and the names of those that are."""

    source: SafetensorsFolder
    storage_format: StorageFormat
    weights: frozenset[str]

    @classmethod
    def at(cls, source: SafetensorsFolder, storage_format: StorageFormat | None) -> "PackedCheckpoint | None":
        """The one in ``source``; None where nothing is packed in it.

        Raises:
            ValueError: nothing is, though config.json says so.
        """
        if storage_format is None:
            return None
        weights = storage_format.weights(source)
        return cls(source, storage_format.as_stored(source, min(weights)), frozenset(weights))

    def is_packed(self, layer: str) -> bool:
        """Whether the weight of the linear layer of that name is."""
        return f"{layer}.weight" in self.weights


def read_storage_format(config: Mapping[str, Any]) -> StorageFormat | None:
    """What config.json says of packed weights; None where there are none.

    Raises:
        ValueError: a quantization that is not read here, by name.
    """
    said = config.get(CONFIG_KEY)
    if said is None:
        return None
    if not isinstance(said, dict):
        raise ValueError(f"{CONFIG_KEY} must be an object, got {said!r}")
    in_4bit, in_8bit = (said.get(f"load_in_{n}bit") or said.get(f"_load_in_{n}bit") for n in (4, 8))
    # bitsandbytes checkpoints of 2023 do not name it
    method = said.get("quant_method") or (BITSANDBYTES if in_4bit or in_8bit else None)
    if method == MXFP4:  # experts alone, which are read as if they were in 16 bits
        return None
    if method == QUANT_METHOD:
        return _own_storage_format(said)
    if method != BITSANDBYTES:
        raise ValueError(f"{CONFIG_KEY}: quant_method {method!r} is not read here; {_ORIGINAL}")
    if in_8bit or not in_4bit:
        raise ValueError(
            f"{CONFIG_KEY}: this is an LLM.int8 checkpoint; of bitsandbytes' only 4 bits are read; {_ORIGINAL}"
        )
    quant_type = said.get("bnb_4bit_quant_type", "fp4")  # its default
    if quant_type not in _BNB_TYPES:
        raise ValueError(
            f"{CONFIG_KEY}: bnb_4bit_quant_type is {quant_type!r}; only {' and '.join(_BNB_TYPES)} are read; "
            f"{_ORIGINAL}"
        )
    return StorageFormat("bitsandbytes", bool(said.get("bnb_4bit_use_double_quant")), QuantFormat(quant_type))


def _own_storage_format(said: Mapping[str, Any]) -> StorageFormat:
    try:
        quant_format = own_quant_format(said)
    except ValueError as error:
        raise ValueError(f"{CONFIG_KEY}: {error}; quantize the 16-bit checkpoint again") from None
    return StorageFormat("qsharded", bool(said.get("double_quant", True)), quant_format)


def own_quant_format(said: Mapping[str, Any]) -> QuantFormat:
    """The format that a quantization_config of ours names.

    Raises:
        ValueError: it is of another version, or names none.
    """
    for key, value in own_config().items():
        if key not in ("format", "block_size") and said.get(key) != value:
            raise ValueError(f"{key} must be {value!r} for this version of qsharded, got {said.get(key)!r}")
    try:
        return QuantFormat(said.get("format", ""), said.get("block_size", 0))
    except ValueError as error:
        raise ValueError(f"format and block_size: {error}") from None


def packed_specs(form: Form, quant_format: QuantFormat, name: str, N: int, K: int) -> dict[str, Spec | None]:
    """Dtype and shape of each tensor of a weight [N, K], double-quantized; None where the values decide the size."""
    stored = quant_format.stored_tensors(N, K)
    if form == QUANT_METHOD:
        endings = {"codes": "", "absmax": ABSMAX, "absmax_scales": SCALES, "absmax_offset": OFFSET}
        return {name + endings[part]: spec for part, spec in stored.items()}
    return {
        name: (torch.uint8, (N * K // 2, 1)),
        name + BNB_ABSMAX: (torch.uint8, (N * K // quant_format.block_size,)),
        name + BNB_NESTED: stored["absmax_scales"],
        name + BNB_MAP: (torch.float32, (formats.codebook().numel(),)),
        name + BNB_NESTED_MAP: (torch.float32, (blockwise8.dynamic_map().numel(),)),
        name + BNB_STATE + quant_format.quant_type: None,
    }


def packed_expert_specs(quant_format: QuantFormat, name: str, E: int, N: int, K: int) -> dict[str, Spec]:
    """Dtype and shape of each tensor of packed experts [N, K] in our own form: rows below each other, and a row of the
    second level for each."""
    G = K // quant_format.block_size
    return {
        name: (torch.uint8, (E * N, K // 2)),
        name + ABSMAX: (torch.uint8, (E * N, G)),
        name + SCALES: (torch.float32, (E, formats.second_level_blocks(N, G))),
        name + OFFSET: (torch.float32, (E,)),
    }


def torn_rows(name: str, K: int, quant_format: QuantFormat) -> str:
    """Why a weight of bitsandbytes with ``K`` columns cannot be held, and what to do."""
    return (
        f"{name}: in_features = {K} is no multiple of its blocks of {quant_format.block_size}; bitsandbytes lets "
        "blocks run on into the next row there, and rows are what is sharded. Give the 16-bit checkpoint, or leave "
        "this layer out of what is quantized"
    )


def own_config(quant_format: QuantFormat = NF4_64) -> dict[str, Any]:
    """The quantization_config of our own form."""
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "format": quant_format.quant_type,
        "block_size": quant_format.block_size,
        "absmax_block_size": blockwise8.BLOCK,
    }


def bitsandbytes_config(quant_type: str, dtype: torch.dtype, skipped: Set[str]) -> dict[str, Any]:
    """The quantization_config that transformers writes with weights that bitsandbytes packed, double-quantized.

    Args:
        quant_type: "nf4" or "fp4".
        dtype: to compute in, that of the weights before.
        skipped: layers that stay as they are though they are linear, beside the head.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": _word(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head", *sorted(skipped)] if skipped else None,  # null leaves out the head
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": BITSANDBYTES,
    }


def bitsandbytes_state(quant_format: QuantFormat, N: int, K: int, dtype: torch.dtype, offset: float) -> Tensor:
    """What bitsandbytes keeps beside a packed weight, as the JSON bytes that it writes, uint8.

    Args:
        dtype: of the weight before, to which it is dequantized.
        offset: of the second level.
    """
    state = {
        "quant_type": quant_format.quant_type,
        "blocksize": quant_format.block_size,
        "dtype": _word(dtype),
        "shape": [N, K],
        "nested_blocksize": blockwise8.BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _bitsandbytes_state(source: SafetensorsFolder, name: str, quant_type: str) -> dict[str, Any]:
    tensor = name + BNB_STATE + quant_type
    origin = f"{source.file_of(tensor)}: {tensor}"
    if source.nbytes(tensor) > _LONGEST_STATE:
        raise ValueError(f"{origin} has {source.nbytes(tensor):,} bytes of JSON, more than {_LONGEST_STATE:,}")
    return read_bitsandbytes_state(source.whole(tensor), origin)


def read_bitsandbytes_state(stored: Tensor, origin: str) -> dict[str, Any]:
    """What :func:`bitsandbytes_state` wrote, or bitsandbytes.

    Raises:
        ValueError: it is something else; ``origin``, which names file and tensor, begins the message.
    """
    state = as_object(parse(stored.cpu().numpy().tobytes(), origin, longest=_LONGEST_STATE), origin)
    check(state, _STATE, origin)
    return state


def _require(source: SafetensorsFolder, name: str, key: str, state: Mapping[str, Any], wanted: Any) -> None:
    if state.get(key) != wanted:
        raise ValueError(
            f"{source.file_of(name)}: {name} has {key} {state.get(key)!r}, only {wanted!r} is read here; {_ORIGINAL}"
        )


def _check_map(source: SafetensorsFolder, name: str, wanted: Tensor) -> None:
    if not torch.equal(source.whole(name).float(), wanted):
        raise ValueError(f"{source.file_of(name)}: {name} is another map than this format's; {_ORIGINAL}")


def _check_kind(source: SafetensorsFolder, name: str, dtype: torch.dtype, values: int) -> None:
    if source.dtype(name) != dtype:
        raise ValueError(f"{source.file_of(name)}: {name} is {source.dtype(name)}, must be {dtype}")
    _check_bytes(source, name, values * dtype.itemsize)


def _check_bytes(source: SafetensorsFolder, name: str, nbytes: int) -> None:
    if source.nbytes(name) != nbytes:
        raise ValueError(
            f"{source.file_of(name)}: {name} has {source.nbytes(name)} bytes, config.json's shapes ask for {nbytes}"
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
