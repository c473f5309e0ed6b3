"""Fold a LoRA adapter into its checkpoint, file by file, with one tensor in memory at a time.

Axes: N = out_features, K = in_features.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from qsharded.checkpoint import safetensors_header
from qsharded.checkpoint.adapter import (
    WEIGHTS_FILE,
    copy_rows,
    load_adapter,
    open_weights,
    other_base,
    own_base,
    read_lora_config,
    stored_name,
)
from qsharded.checkpoint.initial_adapter import open_initial
from qsharded.checkpoint.load import checkpoint_name, expected_shapes, skeleton
from qsharded.checkpoint.merge_experts import ExpertMerge
from qsharded.checkpoint.packed_format import CONFIG_KEY, MXFP4, read_storage_format
from qsharded.checkpoint.source import INDEX, SafetensorsFolder
from qsharded.checkpoint.stacked import shapes_in_files
from qsharded.checkpoint.tied_embeddings import described_as, open_tied, tied_names
from qsharded.lora.experts import LoRAExperts
from qsharded.lora.layer import LoRALayer, lora_layers
from qsharded.models import CausalLM
from qsharded.models.choice import AnyConfig, read_config
from qsharded.quant import formats, ops
from qsharded.quant.linear import PackedLinear
from qsharded.quant.pack_weight import pack_weight
from qsharded.utils.durable_files import Replacement
from qsharded.utils.untrusted_json import read_json

logger = logging.getLogger(__name__)

Base = Literal["16bit", "nf4", "fp4"]


def merge_weights(
    checkpoint: Path, adapter: Path, target: Path, base: Base, block_size: int = formats.BLOCK
) -> dict[str, Any]:
    """Write the safetensors of ``checkpoint`` into ``target``, under their names, with the adapter folded in.

    Update and sum are taken in fp32 and rounded once, to the dtype that the checkpoint stores. Everything is checked
    before anything is written. The most that is held is one tensor of the checkpoint, in fp32 and its own dtype.
    An adapter on one of a tied embedding and head unties them: the other, which it does not change, keeps its tensor.

    Args:
        checkpoint: a folder, as ``find_checkpoint`` gives it.
        adapter: a folder that PEFT or qsharded wrote.
        target: an existing folder.
        base: "16bit" adds to the checkpoint's weights, "nf4" and "fp4" to what is left of them after quantization,
            which is what the adapter was trained on.
        block_size: of that quantization.

    Returns the JSON files of the checkpoint that are to be others for the merged one, by name.

    Raises:
        ValueError: checkpoint or adapter is damaged, not supported, or not made for the other; a checkpoint that is
            packed already; a merged weight that is not finite. The tensor is named.
    """
    described = read_json(checkpoint / "config.json")
    if storage_format := read_storage_format(described):
        raise ValueError(
            f"{checkpoint} is packed in 4 bits ({storage_format.form}), to which merged weights would be rounded "
            "again; give --model the 16-bit checkpoint it was made from"
        )
    _refuse_mxfp4(checkpoint, described)
    quant_format = None if base == "16bit" else formats.QuantFormat(base, block_size)
    config, source = open_tied(checkpoint, read_config(described))
    embedding, _ = tied_names(config)
    model = skeleton(config, read_lora_config(adapter), torch.float32, quant_format=quant_format)
    source.check(shapes_in_files(source, expected_shapes(model)))
    load_adapter(model, adapter)  # on the meta device: nothing is kept, but every name and shape is checked
    with open_weights(adapter / WEIGHTS_FILE) as file, _initial(adapter, base) as initial:
        merge = _Merge.of(model, source, quant_format, file, adapter / WEIGHTS_FILE, initial)
        added = _untied(config, source, merge)
        for path in source.files():
            logger.info("merging %s", path.name)
            copies = added if path == source.file_of(embedding) else {}
            _rewrite(path, target / path.relative_to(checkpoint), merge.tensor, copies)
    if merge.adapts_an_end():
        config = replace(config, tie_word_embeddings=False)
    return _changed_json(checkpoint, source, described, config, added)


def _refuse_mxfp4(checkpoint: Path, described: Mapping[str, Any]) -> None:
    said = described.get(CONFIG_KEY)
    if isinstance(said, dict) and said.get("quant_method") == MXFP4:
        raise ValueError(
            f"{checkpoint} has experts in MXFP4, to which merged weights would be rounded again. Give --model the same "
            "in 16 bits, which transformers writes: AutoModelForCausalLM.from_pretrained(PATH, dtype='bfloat16', "
            "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(FOLDER)"
        )


def _initial(adapter: Path, base: Base) -> AbstractContextManager[Any]:
    """What is to be taken off the update. Weights in 16 bits lack nothing that an adapter began with; to those that are
    rounded as its base was, the whole of it belongs."""
    opened = open_initial(adapter) if base == "16bit" else None
    return nullcontext() if opened is None else opened


def _untied(config: AnyConfig, source: SafetensorsFolder, merge: "_Merge") -> dict[str, str]:
    """Tensors to add, each as a copy of a stored one: of a tied pair that will differ, the one that is missing. Both by
    their names in the files."""
    embedding, head = tied_names(config)
    if not (config.tie_word_embeddings and merge.adapts_an_end()) or head in source.names():
        return {}
    embedding, head = source.name_in_files(embedding), source.name_in_files(head)
    return {embedding: head} if source.renamed else {head: embedding}


def _changed_json(
    checkpoint: Path, source: SafetensorsFolder, described: dict[str, Any], config: AnyConfig, added: dict[str, str]
) -> dict[str, Any]:
    changed, says = {}, described_as(described, config)
    if says != described:
        changed["config.json"] = says
    if added and source.index is not None:
        index = read_json(source.index)
        embedding, _ = tied_names(config)
        file = source.file_of(embedding).relative_to(checkpoint).as_posix()
        index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(added, file)}.items()))
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += source.nbytes(embedding)
        changed[INDEX] = index
    return changed


@dataclass(frozen=True)
class _Merge:
    """What becomes of each tensor of a checkpoint; the tensors are called as in a model of text.

    Attributes:
        adapted: tensor -> (name, layer on the meta device) of the layer that holds it and its update.
        replaced: tensors that the adapter holds whole (modules_to_save).
        brought: tensors of which the adapter holds the frozen weight too, which counts -> that one's name in its file.
        rounded: tensors to quantize and dequantize first.
        quant_format: to which, or None.
        name_here: what a tensor of the checkpoint's files is called here.
        name_in_adapter: what the adapter's file calls what is called so here.
        ends: the embedding's weight and the head's.
        file, path: the adapter's, open.
        initial: the file of what the adapter began with, open, where that is to be taken off; or None.
    """

    adapted: dict[str, tuple[str, LoRALayer]]
    replaced: set[str]
    brought: dict[str, str]
    rounded: set[str]
    quant_format: formats.QuantFormat | None
    name_here: Callable[[str], str]
    name_in_adapter: Callable[[str], str]
    ends: tuple[str, str]
    file: Any
    path: Path
    initial: Any
    experts: ExpertMerge

    @classmethod
    def of(
        cls,
        model: CausalLM,
        source: SafetensorsFolder,
        quant_format: formats.QuantFormat | None,
        file: Any,
        path: Path,
        initial: Any,
    ) -> "_Merge":
        """For the skeleton ``model``, whose trainable parameters are the tensors in ``file``."""
        updates = {parameter for _, layer in lora_layers(model) for parameter in layer.parameters()}
        packed = {checkpoint_name(f"{name}.weight") for name, m in model.named_modules() if isinstance(m, PackedLinear)}
        linears = [(name, layer) for name, layer in lora_layers(model) if not isinstance(layer, LoRAExperts)]
        adapted: dict[str, tuple[str, LoRALayer]] = {f"{name}.weight": (name, layer) for name, layer in linears}
        bases = {tensor: stored_name(model, own_base(name)) for tensor, (name, _) in adapted.items()}
        held = set(file.keys())
        embedding, head = tied_names(model.config)
        ends = {end: stored_name(model, end) for end in (embedding, head) if end not in bases}
        bases |= {end: name for end, name in ends.items() if name in held}
        if model.config.tie_word_embeddings:  # what is brought for one of them is the other's too
            for end, other in ((head, embedding), (embedding, head)):
                if bases.get(other) in held:
                    bases.setdefault(end, bases[other])
        return cls(
            adapted=adapted,
            replaced={name for name, p in model.named_parameters() if p.requires_grad and p not in updates},
            brought={tensor: name for tensor, name in bases.items() if name in held},
            rounded=packed if quant_format else set(),
            quant_format=quant_format,
            name_here=source.name_here,
            name_in_adapter=partial(stored_name, model),
            ends=(embedding, head),
            file=file,
            path=path,
            initial=initial,
            experts=ExpertMerge(
                model, source, quant_format, partial(_factors, partial(stored_name, model), file, path)
            ),
        )

    def adapts_an_end(self) -> bool:
        """Whether the embedding or the head gets an update, so that they are not one weight any more."""
        return any(end in self.adapted for end in self.ends)

    def changes(self, name: str) -> bool:
        """Whether the merged checkpoint holds another tensor under ``name``."""
        return name in self.experts or any(
            name in changed for changed in (self.adapted, self.replaced, self.brought, self.rounded)
        )

    def tensor(self, name: str, stored: Tensor) -> Tensor:
        """What the merged checkpoint holds under ``name``, where the checkpoint holds ``stored``; of its dtype."""
        name = self.name_here(name)
        if not self.changes(name):
            return stored
        new = self._new(name, stored).to(stored.dtype)
        if not new.isfinite().all():
            raise ValueError(f"{name} is not finite once merged: {self.path} is damaged, or {stored.dtype} overflows")
        return new

    def _new(self, name: str, stored: Tensor) -> Tensor:
        if name in self.experts:
            return self.experts.merged(name, stored)
        if name in self.replaced:
            return self.file.get_tensor(self.name_in_adapter(name))
        base = stored
        if name in self.brought:
            base = self.file.get_tensor(self.brought[name])
            if not torch.equal(base.to(stored.dtype), stored):
                logger.warning(other_base(self.brought[name], self.path))
        elif self.quant_format is not None and name in self.rounded:
            base = quantized_and_dequantized(stored, name, self.quant_format)
        return self._delta(*self.adapted[name]).add_(base) if name in self.adapted else base

    def _delta(self, name: str, layer: LoRALayer) -> Tensor:
        """The update in fp32, of the weight's shape. The adapter's parameters are in memory for this long alone."""
        update = self._product(self.file, name, layer)
        return update if self.initial is None else update.sub_(self._product(self.initial, name, layer))

    def _product(self, file: Any, name: str, layer: LoRALayer) -> Tensor:
        with torch.no_grad():
            return layer.product(*_factors(self.name_in_adapter, file, self.path, name, layer))


def _factors(
    name_in_adapter: Callable[[str], str], file: Any, path: Path, name: str, layer: LoRALayer
) -> tuple[Tensor, Tensor]:
    """An adapter's A and B out of its open file."""
    values = {part: torch.empty_like(meta, device="cpu") for part, meta in layer.updates().items()}
    for part, value in values.items():
        copy_rows(file, name_in_adapter(f"{name}.{part}"), value, path)
    A, B = values.values()
    return A, B


def quantized_and_dequantized(weight: Tensor, name: str, quant_format: formats.QuantFormat) -> Tensor:
    """The weight [N, K] in fp32 as a model in 4 bits computes with it: quantized, doubly, and dequantized.

    Raises:
        ValueError: NaN or infinity in the tensor ``name``.
    """
    formats.check_weight(weight, quant_format, name)
    return ops.nf4_dequantize(pack_weight(weight, quant_format), torch.float32)


def _rewrite(source: Path, target: Path, change: Callable[[str, Tensor], Tensor], copies: Mapping[str, str]) -> None:
    """Copy a safetensors file with its tensors changed. Names, shapes and dtypes stay, and so the header does, but for
    ``copies``, tensors to add: a new name each, and the stored tensor of which it gets what ``change`` makes of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    header = safetensors_header.extended(safetensors_header.read(source), copies)
    head = safetensors_header.head(header)
    nbytes = len(head) + safetensors_header.data_bytes(header)
    with safe_open(source, framework="pt") as file, Replacement(target, nbytes) as out:
        out.write(head)
        for name, origin in [*((name, name) for name in file.offset_keys()), *copies.items()]:
            stored = file.get_tensor(origin)
            changed = change(name, stored)
            assert (changed.shape, changed.dtype) == (stored.shape, stored.dtype)
            out.write(changed.contiguous().flatten().view(torch.uint8).numpy().data)
