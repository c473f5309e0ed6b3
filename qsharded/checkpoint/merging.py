"""What becomes of each tensor of a checkpoint when an adapter is merged into it, one tensor in memory at a time.

Axes: N = out_features, K = in_features.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qsharded.checkpoint.adapter import (
    WEIGHTS_FILE,
    buffers_beside,
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
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.checkpoint.stacked import shapes_in_files
from qsharded.checkpoint.tied_embeddings import open_tied, tied_names
from qsharded.lora.experts import LoRAExperts
from qsharded.lora.layer import LoRALayer, lora_layers
from qsharded.models import CausalLM
from qsharded.models.choice import read_config
from qsharded.quant import formats
from qsharded.quant.linear import PackedLinear
from qsharded.quant.pack_weight import rounded
from qsharded.utils.untrusted_json import read_json

logger = logging.getLogger(__name__)

Base = Literal["16bit", "nf4", "fp4"]


@contextmanager
def opened(checkpoint: Path, adapter: Path, base: Base, block_size: int = formats.BLOCK) -> Iterator["Merge"]:
    """The merge of ``adapter`` into ``checkpoint``, once every name and shape is checked.

    Args and errors: as :func:`qsharded.checkpoint.merge_adapter.merge_weights`.
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
    model = skeleton(config, read_lora_config(adapter), torch.float32, quant_format=quant_format)
    source.check(shapes_in_files(source, expected_shapes(model)))
    load_adapter(model, adapter)  # on the meta device: nothing is kept, but every name and shape is checked
    with open_weights(adapter / WEIGHTS_FILE) as file, _initial(adapter, base) as initial:
        yield Merge.of(model, source, quant_format, file, adapter / WEIGHTS_FILE, initial)


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


@dataclass(frozen=True)
class Merge:
    """What becomes of each tensor; the tensors are called as in a model of text.

    Attributes:
        model: with its adapters, on the meta device.
        source: the checkpoint's files.
        adapted: tensor -> (name, layer on the meta device) of the layer that holds it and its update.
        replaced: tensors that the adapter holds whole (modules_to_save).
        brought: tensors of which the adapter holds the frozen weight too, which counts -> that one's name in its file.
        rounded: tensors to quantize and dequantize first.
        quant_format: to which, or None.
        ends: the embedding's weight and the head's.
        file, path: the adapter's, open.
        initial: the file of what the adapter began with, open, where that is to be taken off; or None.
        experts: what becomes of those.
    """

    model: CausalLM
    source: SafetensorsFolder
    adapted: dict[str, tuple[str, LoRALayer]]
    replaced: set[str]
    brought: dict[str, str]
    rounded: set[str]
    quant_format: formats.QuantFormat | None
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
    ) -> "Merge":
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
        bases |= {name: stored_name(model, name) for name, _ in buffers_beside(model)}
        if model.config.tie_word_embeddings:  # what is brought for one of them is the other's too
            for end, other in ((head, embedding), (embedding, head)):
                if bases.get(other) in held:
                    bases.setdefault(end, bases[other])
        factors = partial(_factors, partial(stored_name, model), file, path)
        return cls(
            model=model,
            source=source,
            adapted=adapted,
            replaced={name for name, p in model.named_parameters() if p.requires_grad and p not in updates},
            brought={tensor: name for tensor, name in bases.items() if name in held},
            rounded=packed if quant_format else set(),
            quant_format=quant_format,
            ends=(embedding, head),
            file=file,
            path=path,
            initial=initial,
            experts=ExpertMerge(model, source, quant_format, factors),
        )

    def adapts_an_end(self) -> bool:
        """Whether the embedding or the head gets an update, so that they are not one weight any more."""
        return any(end in self.adapted for end in self.ends)

    def changes(self, name: str) -> bool:
        """Whether the merged checkpoint holds another tensor under ``name``."""
        changed = self.experts, self.adapted, self.replaced, self.brought, self.rounded
        return any(name in names for names in changed)

    def tensor(self, name: str, stored: Tensor) -> Tensor:
        """What the merged checkpoint holds under ``name``, where the checkpoint holds ``stored``; of its dtype."""
        name = self.source.name_here(name)
        if not self.changes(name):
            return stored
        new = self._new(name, stored).to(stored.dtype)
        if not new.isfinite().all():
            raise ValueError(f"{name} is not finite once merged: {self.path} is damaged, or {stored.dtype} overflows")
        return new

    def _new(self, name: str, stored: Tensor) -> Tensor:
        if name in self.experts:
            return self.experts.merged(name, stored)
        base = self._base(name, stored)
        if name in self.brought and not torch.equal(base.to(stored.dtype), stored):
            logger.warning(other_base(self.brought[name], self.path))
        if name not in self.adapted:
            return base
        return self._delta(*self.adapted[name]).add_(base)

    def beside_adapters(self, name: str, stored: Tensor) -> Tensor:
        """The weight that the adapters' updates are added to the output of."""
        base = self._base(name, stored)
        if self.initial is None or name not in self.adapted:
            return base
        return base - self._product(self.initial, *self.adapted[name])

    def _base(self, name: str, stored: Tensor) -> Tensor:
        if name in self.replaced:
            return self.file.get_tensor(self._name_in_adapter(name))
        if name in self.brought:
            return self.file.get_tensor(self.brought[name])
        if self.quant_format is not None and name in self.rounded:
            formats.check_weight(stored, self.quant_format, name)
            return rounded(stored, self.quant_format)
        return stored

    def _delta(self, name: str, layer: LoRALayer) -> Tensor:
        """The update in fp32, of the weight's shape. The adapter's parameters are in memory for this long alone."""
        update = self._product(self.file, name, layer)
        return update if self.initial is None else update.sub_(self._product(self.initial, name, layer))

    def _name_in_adapter(self, name: str) -> str:
        return stored_name(self.model, name)

    def _product(self, file: Any, name: str, layer: LoRALayer) -> Tensor:
        with torch.no_grad():
            return layer.product(*_factors(self._name_in_adapter, file, self.path, name, layer))


def _factors(
    name_in_adapter: Callable[[str], str], file: Any, path: Path, name: str, layer: LoRALayer
) -> tuple[Tensor, Tensor]:
    """An adapter's A and B out of its open file."""
    values = {part: torch.empty_like(meta, device="cpu") for part, meta in layer.updates().items()}
    for part, value in values.items():
        copy_rows(file, name_in_adapter(f"{name}.{part}"), value, path)
    A, B = values.values()
    return A, B
