"""Write a packed checkpoint from one in 16 or 32 bits, file by file, with a chunk of a tensor in memory at a time.

Axes: N = out_features, K = in_features, P = K/2, G = blocks in a row.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.checkpoint import fill_shards, packed_format
from qsharded.checkpoint.expert_fills import packed_experts_in
from qsharded.checkpoint.file_sinks import BitsandbytesSink, FileSink
from qsharded.checkpoint.files import write_json
from qsharded.checkpoint.load import expected_shapes, packed_layers, skeleton
from qsharded.checkpoint.pack_experts import ExpertsToPack
from qsharded.checkpoint.packed_format import Form, StorageFormat
from qsharded.checkpoint.row_chunks import RowChunk, row_chunks_of
from qsharded.checkpoint.safetensors_header import Spec
from qsharded.checkpoint.safetensors_writer import SafetensorsFile
from qsharded.checkpoint.source import INDEX, SafetensorsFolder
from qsharded.checkpoint.stacked import shapes_in_files
from qsharded.checkpoint.tied_embeddings import described_as, open_tied
from qsharded.models.choice import read_config
from qsharded.quant.experts import AnyPackedWeight
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.linear import PackedLinear
from qsharded.quant.packed_weight import QuantizedAbsmax
from qsharded.utils.progress_bar import ProgressBar
from qsharded.utils.sharding import RowRange
from qsharded.utils.untrusted_json import read_json

logger = logging.getLogger(__name__)

Ready = Callable[[str], AnyPackedWeight | None]
"""From the name of a tensor, as a model of text has it, to its packed weight where one is made already."""


def quantize_checkpoint(
    checkpoint: Path,
    target: Path,
    form: Form,
    device: torch.device,
    quant_format: QuantFormat = NF4_64,
    ready: Ready = lambda name: None,
) -> None:
    """Write ``checkpoint`` with its linear layers packed: safetensors under the same names, their index, config.json.

    The bytes are those that ``load_model`` makes of it, for the default format. What is not packed keeps its dtype, and
    so do linear layers whose in_features is no multiple of the block size.

    Args:
        checkpoint: a folder, as ``find_checkpoint`` gives it.
        target: an existing folder.
        form: "qsharded", or "bitsandbytes" for transformers and bitsandbytes.
        device: to quantize on.
        quant_format: what to quantize to.
        ready: weights that are in it already, which are written as they are.

    Raises:
        ValueError: the checkpoint is damaged, not supported, packed already, or not finite; or no layer fits.
    """
    described = read_unpacked(checkpoint)
    config, source = open_tied(checkpoint, read_config(described))
    if config.wrapper and form != packed_format.QUANT_METHOD:
        raise ValueError(
            f"{checkpoint} is a multimodal model ({config.wrapper}), whose other parts stay in 16 bits: of such, "
            "--format qsharded alone is written"
        )
    model = skeleton(config, None, torch.bfloat16, StorageFormat(form, quant_format=quant_format))
    experts = {f"{name}.weight": part for name, part in packed_experts_in(model)}
    if experts and form != packed_format.QUANT_METHOD:
        raise ValueError(
            f"{checkpoint} is a mixture of experts, which {form}'s form does not hold in 4 bits: --format qsharded does"
        )
    expected = expected_shapes(model)
    shapes = shapes_in_files(source, expected)
    source.check(shapes)
    shapes = shapes_in_files(source, {name: shape for name, shape in expected.items() if name not in experts})
    parts = source.all_parts()

    def in_parts(name: str) -> str:
        return name if parts is source else source.name_in_files(name)

    layers = {in_parts(name): layer for name, layer in packed_layers(model).items()}
    names = [*map(in_parts, shapes), *source.other_parts()]
    nbytes = sum(math.prod(parts.shape(name)) * parts.dtype(name).itemsize for name in names)
    packs = {in_parts(name): ExpertsToPack(source, name, part, in_parts) for name, part in experts.items()}
    nbytes += sum(one.nbytes for one in packs.values())
    with fill_shards.shown_bar("quantizing", nbytes) as bar:
        names_here = {in_parts(name): name for name in shapes}
        writer = _Writer(parts, layers, packs, form, quant_format, device, names_here, ready, bar)
        names_of = writer.names_by_file([*names, *packs])
        files = {path: writer.write(target / path, names) for path, names in sorted(names_of.items())}
    if source.index is not None:
        weight_map = {name: path.as_posix() for path, file in files.items() for name in file.names()}
        size = sum(file.nbytes for file in files.values())
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    said = packed_format.own_config(quant_format) if form == "qsharded" else _bitsandbytes_config(model, writer)
    write_json(target / "config.json", described_as(described, config) | {packed_format.CONFIG_KEY: said})


def read_unpacked(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint in 16 or 32 bits.

    Raises:
        ValueError: it is packed already, or no config.json.
    """
    described = read_json(checkpoint / "config.json")
    if packed_format.read_storage_format(described):
        raise ValueError(f"{checkpoint} is packed already; give --model the 16-bit checkpoint it was made from")
    return described


@dataclass(frozen=True)
class _Writer:
    """Writes the tensors of ``source``, those of ``layers`` packed. ``names_here``: what a model of text calls them."""

    source: SafetensorsFolder
    layers: Mapping[str, PackedLinear]
    experts: Mapping[str, ExpertsToPack]
    form: Form
    quant_format: QuantFormat
    device: torch.device
    names_here: Mapping[str, str]
    ready: Ready
    bar: ProgressBar | None

    def names_by_file(self, to_write: Iterable[str]) -> dict[Path, list[str]]:
        """The tensors to write, by the file that holds them."""
        names: dict[Path, list[str]] = {}
        for name in to_write:
            stored = self.experts[name].stored if name in self.experts else name
            names.setdefault(self.source.file_of(stored).relative_to(self.source.folder), []).append(name)
        return names

    def write(self, path: Path, names: Sequence[str]) -> SafetensorsFile:
        """One file of them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = [self._specs(name) for name in names]
        known = {name: spec for entry in specs for name, spec in entry.items() if spec is not None}
        late = [name for entry in specs for name, spec in entry.items() if spec is None]
        with SafetensorsFile(path, known, late) as file:
            fill_shards.run([self._fill(name, file) for name in names], self.source, self.device, bar=self.bar)
        return file

    def _specs(self, name: str) -> Mapping[str, Spec | None]:
        if name in self.experts:
            return self.experts[name].specs(name)
        if name not in self.layers:
            return {name: (self.source.dtype(name), self.source.shape(name))}
        return packed_format.packed_specs(self.form, self.quant_format, name, *self.source.shape(name))

    def _fill(self, name: str, file: SafetensorsFile) -> fill_shards.Fill:
        if name in self.experts:
            return self._fill_of_experts(self.experts[name], name, file)
        if name not in self.layers:
            return _CopyFill(self.source, name, file)
        (N, K), dtype = self.source.shape(name), self.source.dtype(name)
        sink = FileSink(file, name, K)
        if self.form == "bitsandbytes":
            sink = BitsandbytesSink(file, name, K, N, self.quant_format, dtype)
        if (made := self.ready(self.names_here[name])) is not None:
            if self.bar is not None:
                self.bar.advance(N * K * dtype.itemsize)  # which need not be read
            return _ReadyFill(made, sink)
        return fill_shards.QuantizingFill(self.source, name, K, RowRange(0, N, N, None), self.quant_format, sink)

    def _fill_of_experts(self, experts: ExpertsToPack, name: str, file: SafetensorsFile) -> fill_shards.Fill:
        made = self.ready(experts.name)
        if made is None:
            return experts.fill(name, file)
        if self.bar is not None:
            self.bar.advance(experts.nbytes)
        return _ReadyFill(made, experts.sink(name, file))


class _CopyFill:
    """A tensor that is written as it is."""

    def __init__(self, source: SafetensorsFolder, name: str, file: SafetensorsFile) -> None:
        N, *others = source.shape(name)
        row_bytes = math.prod(others) * source.dtype(name).itemsize
        self.chunks = row_chunks_of(source, name, 0, N, row_bytes)
        self._file, self._finite = file, fill_shards.FiniteCheck(name)

    def take(self, chunk: RowChunk, values: Tensor) -> None:
        self._finite.add(values)
        self._file.write(chunk.name, values, chunk.start * chunk.row_bytes)

    def check(self) -> None:
        self._finite.demand()

    def finish(self, device: torch.device) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class _ReadyFill:
    """A packed weight, or experts' below each other, written as it is."""

    packed: AnyPackedWeight
    sink: FileSink
    chunks: Sequence[RowChunk] = ()

    def take(self, chunk: RowChunk, values: Tensor) -> None:
        raise AssertionError("it has no chunks")

    def check(self) -> None:
        """It was checked when it was made."""

    def finish(self, device: torch.device) -> None:
        codes, absmax, scales, offset = self.packed.tensors
        assert codes is not None
        assert absmax is not None
        assert scales is not None
        assert offset is not None
        self.sink.put_codes(0, codes)
        self.sink.put_absmax(QuantizedAbsmax(absmax, scales, offset))


def _bitsandbytes_config(model: nn.Module, writer: _Writer) -> dict[str, Any]:
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    dtype = writer.source.dtype(next(iter(writer.layers)))
    return packed_format.bitsandbytes_config(writer.quant_format.quant_type, dtype, plain)
