"""The first values of a model's adapters, from the rounding of the base that they train beside."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.calibration.layer_walk import LayerWalk
from qsharded.calibration.packed_base import PackedBaseWalk, decoded, packed_experts
from qsharded.calibration.residual import AdapterShape, Rounded, residual_start
from qsharded.calibration.rows import CalibrationRows
from qsharded.checkpoint.adapter import stored_name
from qsharded.checkpoint.base_identity import BaseIdentity
from qsharded.checkpoint.fingerprint import Fingerprint
from qsharded.checkpoint.load import expected_shapes, packed_layers, skeleton
from qsharded.checkpoint.pack import read_unpacked
from qsharded.checkpoint.packed_format import PackedCheckpoint
from qsharded.checkpoint.stacked import shapes_in_files
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.lora.layer import LoRALinear, lora_layers
from qsharded.models import CausalLM
from qsharded.models.choice import read_config
from qsharded.quant.formats import NF4_64
from qsharded.quant.linear import PackedLinear
from qsharded.quant.pack_weight import rounded
from qsharded.utils import collectives


def start_from_residual(
    model: CausalLM,
    packed: PackedCheckpoint | None,
    original: Path,
    rows: CalibrationRows,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The adapters' tensors, by their names in an adapter file. All ranks of ``group`` call this.

    Args:
        model: with adapters, on the meta device.
        packed: its weights, where they are packed already; else those of ``original`` are rounded to nearest.
        original: the checkpoint in 16 or 32 bits.
        rows: what inputs are taken from.
        device, dtype: to compute on, and of the activations.
        seed: of adapters that are not beside a packed layer: they start at no change.

    Raises:
        ValueError: ``original`` is damaged, packed, or not what ``packed`` was made from.
    """
    config, source = open_tied(original, read_config(read_unpacked(original)))
    whole = skeleton(config, None, dtype, quant_format=None).eval()
    source.check(shapes_in_files(source, expected_shapes(whole)))
    _refuse_another(packed, original)
    shapes = {
        f"{name}.weight": AdapterShape(layer.lora_A.weight.shape[0], layer.scaling)
        for name, layer in lora_layers(model)
        if isinstance(layer, LoRALinear) and isinstance(layer.base_layer, PackedLinear)
    }
    ids_RS = rows.of_rank(group)
    if packed is None:
        walk = LayerWalk(whole, source, ids_RS, device, NF4_64)
    else:
        walk = PackedBaseWalk(whole, source, ids_RS, device, packed, packed_experts(model))
    rounded = _rounding(model, packed, device)
    is_main = collectives.rank(group) == 0
    found = residual_start(walk, source, rounded, shapes, group, shows_progress=is_main)
    return _named(model, found, seed)


def _named(model: CausalLM, found: dict[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, Tensor]:
    """In the dtype that trains, and with the others' usual start."""
    tensors = {}
    for name, layer in lora_layers(model):
        values = found.get(f"{name}.weight") or layer.initial(name, seed)
        for (part, parameter), value in zip(layer.updates().items(), values, strict=True):
            tensors[stored_name(model, f"{name}.{part}")] = value.to(parameter.dtype).contiguous()
    return tensors


def _rounding(model: CausalLM, packed: PackedCheckpoint | None, device: torch.device) -> Rounded:
    layers = packed_layers(model)

    def nearest(name: str, weight_NK: Tensor) -> Tensor | None:
        layer = layers.get(name)
        if layer is None:
            return None
        return rounded(weight_NK, layer.quant_format)

    def stored(name: str, weight_NK: Tensor) -> Tensor | None:
        assert packed is not None
        return decoded(packed, name, layers[name], device) if name in layers else None

    chosen: Callable[[str, Tensor], Tensor | None] = nearest if packed is None else stored
    return chosen


def _refuse_another(packed: PackedCheckpoint | None, original: Path) -> None:
    """Where the packed checkpoint says what it was made from. Of others shapes alone are held against each other."""
    made_from = BaseIdentity.of(packed.source.folder).made_from if packed else None
    if made_from and (different := made_from.difference(Fingerprint.of(original), original)):
        raise ValueError(f"{packed and packed.source.folder} was not packed from {original}: {different}")
