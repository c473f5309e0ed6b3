"""What a folder holds and whether it is sound: a model, an adapter, or a training checkpoint."""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qsharded.checkpoint.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_lora_config
from qsharded.checkpoint.calibration_record import CalibrationRecord
from qsharded.checkpoint.expected_tensors import bitsandbytes_states, expected_tensors, packed_bytes
from qsharded.checkpoint.files import FileRecord, read_record
from qsharded.checkpoint.load import expected_shapes, skeleton
from qsharded.checkpoint.manifest import MANIFEST_FILE, read_manifest
from qsharded.checkpoint.negative_scales import count_negative_scales
from qsharded.checkpoint.packed_format import CONFIG_KEY, StorageFormat, own_config, own_quant_format
from qsharded.checkpoint.resume import STATE_FILE
from qsharded.checkpoint.scan import Scan, Stored, read_header, scan_file
from qsharded.checkpoint.source import RECOMPUTED, SafetensorsFolder
from qsharded.checkpoint.stacked import shapes_in_files
from qsharded.checkpoint.tied_embeddings import open_tied, tied_names
from qsharded.lora.config import LoRAConfig, ends_with
from qsharded.models.choice import AnyConfig, read_config
from qsharded.models.config import declared_dtype
from qsharded.quant.experts import DOWN, GATE_UP
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.utils.untrusted_json import read_json

INDEX = "model.safetensors.index.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class FileReport:
    """One file: its hash, and who vouches for that ("" where nobody does)."""

    name: str
    size: int
    sha256: str
    vouched: str = ""


@dataclass
class Report:
    """What was found.

    Attributes:
        kind: in words.
        classes: bytes of tensors by class.
        files: every file that was read.
        problems: what is wrong, in the order found.
        notes: what could not be looked at.
    """

    kind: str
    classes: Counter[str] = field(default_factory=Counter)
    files: list[FileReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect_path(path: Path) -> Report:
    """Read everything that ``path`` holds, a few megabytes at a time.

    Raises:
        ValueError: no such path, or none of the formats that are known.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return _safetensors_file(path)
    if (path / STATE_FILE).is_file() or ((path / MANIFEST_FILE).is_file() and (path / "adapter").is_dir()):
        return _training_checkpoint(path)
    if (path / CONFIG_FILE).is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return _model(path)
    inside = [name for name in ("adapter", "checkpoints") if (path / name).is_dir()]
    hint = f"; did you mean {' or '.join(str(path / name) for name in inside)}?" if inside else ""
    fault = "holds no model, adapter or checkpoint" if path.exists() else "does not exist"
    raise ValueError(f"{path} {fault}{hint}")


def _safetensors_file(path: Path) -> Report:
    report = Report("safetensors file")
    tensors = _scan(report, path.parent, [path], frozenset(packed_bytes(_names(path))))
    report.classes.update(_by_class(tensors.values(), lambda tensor: tensor.dtype))
    return report


def _scan(
    report: Report, folder: Path, paths: Iterable[Path], packed: frozenset[str] = frozenset()
) -> dict[str, Stored]:
    """Read files into the report; returns their tensors by name."""
    found: dict[str, Stored] = {}
    for path in paths:
        scan = scan_file(path, packed)
        report.files.append(FileReport(str(path.relative_to(folder)), scan.size, scan.sha256))
        report.problems += scan.problems + _twice(found, path, scan)
        _check_hub_cache(report, path)
        found |= {tensor.name: tensor for tensor in scan.tensors}
    return found


def _twice(found: Mapping[str, Stored], path: Path, scan: Scan) -> list[str]:
    return [f"{path.name}: {tensor.name} stands in another file too" for tensor in scan.tensors if tensor.name in found]


def _check_hub_cache(report: Report, path: Path) -> None:
    """The Hub's cache keeps large files under the names of their hashes, with links to them."""
    target = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(target):
        _compare(report, target, "the Hub's cache")


def _compare(report: Report, wanted: str, by: str) -> None:
    """Hold the last file's hash against the one that it should have."""
    file = report.files[-1]
    if file.sha256 == wanted:
        file.vouched = by
    else:
        report.problems.append(f"{file.name} is damaged: its SHA-256 is {file.sha256}, {by} says {wanted}")


def _by_class(tensors: Iterable[Stored], class_of: Callable[[Stored], str]) -> Counter[str]:
    classes: Counter[str] = Counter()
    for tensor in tensors:
        classes[class_of(tensor)] += tensor.nbytes
    return classes


# A model


def _model(folder: Path) -> Report:
    described = read_json(folder / "config.json")
    report = Report(_model_kind(described))
    indexed = _indexed(report, folder)
    single = sorted(folder.glob("model.safetensors")) or folder.glob("model*.safetensors")
    paths = sorted({folder / file for file in indexed.values()} if indexed else single)
    there = [path for path in paths if path.is_file()]
    report.problems += [f"{path.name} is missing" for path in paths if not path.is_file()]
    if not paths:
        report.problems.append(f"{folder} holds no model*.safetensors")
    names = [name for path in there for name in _names(path)]
    tensors = _scan(report, folder, there, frozenset(packed_bytes(names)))
    report.problems += [
        f"{INDEX} names {name}, which no file holds" for name in sorted(indexed.keys() - tensors.keys())
    ]
    codes = packed_bytes(tensors)
    report.classes.update(_by_class(tensors.values(), lambda tensor: _model_class(tensor, codes)))
    _note_unpacked(report)
    _note_calibration(report, folder, tensors)
    if paths and len(there) == len(paths) and all(map(_names, there)):  # or most would be missing
        _check_against_config(report, folder, described, tensors)
    return report


def _model_kind(described: Mapping[str, Any]) -> str:
    said = described.get("quantization_config") or {}
    method = said.get("quant_method", "an unknown quantization") if isinstance(said, dict) else str(said)
    form = f"packed by {method}" if said else f"in {declared_dtype(described) or '16 bits'}"
    return f"Hugging Face checkpoint of a {described.get('model_type', 'model of no type')}, {form}"


def _indexed(report: Report, folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        return {}
    if SafetensorsFolder(folder).index is None:
        report.notes.append(f"{INDEX} is left aside, as transformers leaves it: model.safetensors is there")
        return {}
    try:
        return {str(name): str(file) for name, file in read_json(folder / INDEX)["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        report.problems.append(f"{INDEX} is damaged: {error}")
        return {}


def _names(path: Path) -> list[str]:
    """The tensors' names by the header alone; none where it is damaged, which the scan will say."""
    try:
        return [tensor.name for tensor in read_header(path).tensors]
    except ValueError:
        return []


def _model_class(tensor: Stored, codes: Container[str]) -> str:
    name = tensor.name
    if "absmax" in name or ".quant_" in name or ".nested_" in name:
        return "scales"
    if name in codes:
        return "codes"
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return "embedding and head"
    if len(tensor.shape) > 2:
        return "experts in one tensor"
    return "linear weights" if len(tensor.shape) == 2 else "norms and others"


def _note_unpacked(report: Report) -> None:
    """What of a packed checkpoint is not, though it is neither embedding nor head."""
    unpacked = {kind: report.classes[kind] for kind in ("linear weights", "experts in one tensor")}
    if report.classes["codes"] and any(unpacked.values()):
        total = sum(report.classes.values())
        named = " and ".join(f"{size:,} of {kind}" for kind, size in unpacked.items() if size)
        report.notes.append(f"of {total:,} bytes {sum(unpacked.values()):,} are not packed: {named}")


def _note_calibration(report: Report, folder: Path, tensors: Mapping[str, Stored]) -> None:
    """How the weights were rounded, and scales that no rounding to nearest gives."""
    try:
        record = CalibrationRecord.read(folder)
    except ValueError as error:
        report.problems.append(str(error))
        return
    if record:
        report.notes.append(f"calibrated: {record}")
    with suppress(ValueError, KeyError):  # of damaged files, which the scan has named
        negative, blocks = count_negative_scales(SafetensorsFolder(folder), tensors)
        if negative:
            report.notes.append(
                f"{negative:,} of {blocks:,} blocks have a negative scale, under which the codebook is mirrored: such "
                "are chosen by calibration, and every reader of the format multiplies by them as they are"
            )


def _check_against_config(
    report: Report, folder: Path, described: dict[str, Any], tensors: Mapping[str, Stored]
) -> None:
    try:
        config = read_config({**described, "quantization_config": None})
    except ValueError as error:
        report.notes.append(f"names and shapes were not checked, as qsharded does not read this model: {error}")
        return
    try:
        quant_format = _quant_format(folder, described, tensors)
    except ValueError as error:
        report.problems.append(str(error))
        return
    shapes, others = _shapes(report, folder, config)
    expected = expected_tensors(shapes, tensors, quant_format.block_size)
    report.problems += [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    surplus = sorted(n for n in tensors.keys() - expected.keys() - others if not n.endswith(RECOMPUTED))
    report.problems += [f"{name} has no place in the model that config.json describes" for name in surplus]
    for name in sorted(expected.keys() & tensors.keys()):
        report.problems += [f"{name} {fault}" for fault in expected[name].faults(tensors[name])]


def _shapes(report: Report, folder: Path, config: AnyConfig) -> tuple[dict[str, tuple[int, ...]], Set[str]]:
    """Of the model's weights in 16 bits, by the names that the files must have; and the tensors that are not its own,
    such as a multimodal model's vision tower."""
    with suppress(ValueError):  # damaged files, which the scan has named
        as_stored, source = open_tied(folder, config)
        embedding, head = tied_names(config)
        if as_stored != config:
            report.notes.append(
                f"config.json ties the head to the embedding, but {head} differs from {embedding}: it is used as stored"
            )
        shapes = expected_shapes(skeleton(as_stored, None, torch.bfloat16, quant_format=None))
        if source.renamed:
            shapes[head] = shapes.pop(embedding)
        shapes = shapes_in_files(source, shapes)
        return {source.name_in_files(name): shape for name, shape in shapes.items()}, set(source.other_parts())
    return expected_shapes(skeleton(config, None, torch.bfloat16, quant_format=None)), set()


def _quant_format(folder: Path, described: Mapping[str, Any], names: Iterable[str]) -> QuantFormat:
    """Of the packed weights, if there are any. Ours say it in config.json, bitsandbytes' beside each."""
    if states := bitsandbytes_states(names):
        name = min(states)
        storage_format = StorageFormat("bitsandbytes", quant_format=QuantFormat(states[name].rpartition("__")[2]))
        return storage_format.as_stored(SafetensorsFolder(folder), name).quant_format
    return own_quant_format({**own_config(), **(described.get(CONFIG_KEY) or {})}) if packed_bytes(names) else NF4_64


# An adapter


def _adapter(folder: Path) -> Report:
    report = Report("LoRA adapter in PEFT's format")
    _check_adapter(report, folder, folder)
    _check_json(report, folder, folder / CONFIG_FILE)
    return report


def _check_adapter(report: Report, folder: Path, adapter: Path) -> None:
    if not (adapter / WEIGHTS_FILE).is_file():
        report.problems.append(f"{WEIGHTS_FILE} is missing from {adapter}")
        return
    tensors = _scan(report, folder, [adapter / WEIGHTS_FILE])
    report.classes.update(_by_class(tensors.values(), _adapter_class))
    try:
        lora = read_lora_config(adapter)
    except ValueError as error:
        report.notes.append(f"ranks were not checked: {error}")
        return
    for pair in _PAIRS:
        ends = [(name.removeprefix(PREFIX), end) for name in tensors for end in pair if name.endswith(end)]
        for layer in sorted({name.removesuffix(end) for name, end in ends}):
            report.problems += _pair_faults(layer, _rank(lora, layer, tensors), pair, tensors)


def _rank(lora: LoRAConfig, layer: str, tensors: Mapping[str, Stored]) -> int:
    """PEFT knows experts by their parameters; of two that are adapted, the first is nested in the second."""
    experts = layer.replace(".base_layer", "")
    if not ends_with(experts, "experts"):
        return lora.rank(layer)
    nests = f"{PREFIX}{experts}.base_layer.lora_A.weight" in tensors
    named = [part for part in (GATE_UP, DOWN) if lora.adapts_experts(f"{experts}.{part}")]
    is_first = layer != experts or not nests
    return lora.rank(f"{experts}.{(named or [GATE_UP])[0 if is_first else -1]}")


# The two halves of an adapter, on a linear layer and on an embedding.
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def _part(ending: str) -> str:
    return ending.removeprefix(".").removesuffix(".weight")


def _pair_faults(layer: str, rank: int, pair: tuple[str, str], tensors: Mapping[str, Stored]) -> list[str]:
    a, b = (tensors.get(PREFIX + layer + ending) for ending in pair)
    part_a, part_b = map(_part, pair)
    if a is None or b is None:
        there, lacking = (pair[1], part_a) if a is None else (pair[0], part_b)
        return [f"{PREFIX}{layer}{there} has no {lacking} beside it"]
    if ends_with(layer.replace(".base_layer", ""), "experts") and len(a.shape) == len(b.shape) == 2:
        return _experts_faults(layer, rank, a, b)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        return [f"{layer}: {part_a} is {list(a.shape)}, {part_b} {list(b.shape)}, {CONFIG_FILE} gives rank {rank}"]
    return []


def _experts_faults(layer: str, rank: int, a: Stored, b: Stored) -> list[str]:
    """Of an adapter on experts, whose number the file does not tell: A and B have as many ranks of each."""
    if a.shape[0] == b.shape[1] and a.shape[0] % rank == 0:
        return []
    return [
        f"{layer}: lora_A is {list(a.shape)}, lora_B {list(b.shape)}, {CONFIG_FILE} gives rank {rank} to each expert"
    ]


def _adapter_class(tensor: Stored) -> str:
    if tensor.name.endswith(".base_layer.weight"):
        return "base layers of adapters"
    return "adapters" if ".lora_" in tensor.name else "modules trained in full"


# A training checkpoint


def _training_checkpoint(folder: Path) -> Report:
    report = Report("training checkpoint")
    _check_adapter(report, folder, folder / "adapter")
    tensors = _scan(report, folder, sorted(folder.glob("*.safetensors")))
    report.classes.update(_by_class(tensors.values(), lambda tensor: f"optimizer: {tensor.name.rpartition(':')[2]}"))
    for path in (folder / STATE_FILE, folder / "adapter" / CONFIG_FILE):
        _check_json(report, folder, path)
    _check_manifest(report, folder)
    return report


def _check_json(report: Report, folder: Path, path: Path) -> None:
    try:
        state = read_json(path)
    except ValueError as error:
        report.problems.append(str(error))
        return
    record = read_record(path)
    report.files.append(FileReport(str(path.relative_to(folder)), record.size, record.sha256))
    if path.name == STATE_FILE:
        report.kind += f" of step {state.get('step')}"


def _check_manifest(report: Report, folder: Path) -> None:
    """Every file that the manifest names must be there, with the size and hash that it says."""
    try:
        wanted = read_manifest(folder).files
    except ValueError as error:
        report.problems.append(str(error))
        return
    read = {file.name: file for file in report.files}
    for name, record in wanted.items():
        file = read.get(name)
        if file is None:
            report.problems.append(f"{name} is missing, {MANIFEST_FILE} names it")
        elif FileRecord(file.size, file.sha256) != record:
            report.problems.append(f"{name} is damaged: its size or SHA-256 is not the one in {MANIFEST_FILE}")
        else:
            file.vouched = MANIFEST_FILE
