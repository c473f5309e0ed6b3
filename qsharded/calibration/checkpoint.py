"""From a checkpoint in 16 or 32 bits and calibration rows to its packed weights."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qsharded.calibration.calibrate import calibrate
from qsharded.calibration.layer_store import LayerStore
from qsharded.calibration.layer_walk import LayerWalk
from qsharded.calibration.method import Calibration
from qsharded.calibration.rows import CalibrationRows
from qsharded.calibration.second_moments import MEAN_DAMPING, RELATIVE_DAMPING
from qsharded.checkpoint.base_identity import write_origin
from qsharded.checkpoint.calibration_record import CalibrationRecord
from qsharded.checkpoint.fingerprint import Fingerprint
from qsharded.checkpoint.load import expected_shapes, packed_layers, skeleton
from qsharded.checkpoint.pack import Ready, quantize_checkpoint, read_unpacked
from qsharded.checkpoint.packed_format import Form, StorageFormat
from qsharded.checkpoint.stacked import shapes_in_files
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.data.tokenizer_files import present_files
from qsharded.models.choice import read_config
from qsharded.quant.formats import QuantFormat
from qsharded.utils import collectives
from qsharded.utils.durable_files import copy_whole


@dataclass(frozen=True)
class Calibrated:
    """Packed weights that are done, and how."""

    store: LayerStore
    record: CalibrationRecord


def calibrate_checkpoint(
    checkpoint: Path,
    rows: CalibrationRows,
    how: Calibration,
    unfinished: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> Calibrated:
    """Round the packed layers of ``checkpoint`` for their inputs. All ranks of ``how.group`` call this.

    Args:
        checkpoint: a folder.
        unfinished: a folder for layers that are done: a run that was stopped goes on from there, if nothing changed.
        device: to compute on.
        dtype: of the activations.

    Raises:
        ValueError: the checkpoint is damaged, not supported, packed already, or not finite; fewer rows than ranks.
    """
    config, source = open_tied(checkpoint, read_config(read_unpacked(checkpoint)))
    packed_model = skeleton(config, None, dtype, StorageFormat("qsharded", quant_format=how.quant_format))
    source.check(shapes_in_files(source, expected_shapes(packed_model)))
    model = skeleton(config, None, dtype, quant_format=None).eval()
    record = _record(rows, how)
    made_from = weights_hash(checkpoint), str(dtype), device.type
    is_main = collectives.rank(how.group) == 0
    store = LayerStore(unfinished, how.quant_format)
    if is_main:
        store.begin({**record.to_json(), "made_from": list(made_from)})
    collectives.barrier(how.group)
    walk = LayerWalk(model, source, rows.of_rank(how.group), device)
    calibrate(walk, source, packed_layers(packed_model), how, store, device, shows_progress=is_main)
    return Calibrated(store, replace(record, experts=store.counts()))


def write_packed(
    checkpoint: Path, target: Path, form: Form, device: torch.device, quant_format: QuantFormat, made: Calibrated | None
) -> None:
    """Write ``checkpoint`` packed into ``target``, an existing folder: weights, where they are from, tokenizer.

    Args:
        made: its calibrated weights; None rounds to nearest.
    """
    ready: Ready = made.store.weight if made else lambda name: None
    quantize_checkpoint(checkpoint, target, form, device, quant_format, ready)
    write_origin(checkpoint, target)
    for file in [checkpoint / "generation_config.json", *present_files(checkpoint)]:
        if file.is_file():
            copy_whole(file, target / file.relative_to(checkpoint))
    if made:
        made.record.write(target)


def _record(rows: CalibrationRows, how: Calibration) -> CalibrationRecord:
    count, length = rows.ids_RS.shape
    return CalibrationRecord(
        method=how.method,
        rows=count,
        length=length,
        sources=dict(rows.sources),
        data=rows.fingerprint,
        damping={"of each entry": RELATIVE_DAMPING, "of the mean": MEAN_DAMPING},
        quant_format=str(how.quant_format),
    )


def weights_hash(checkpoint: Path) -> str:
    """Of the weights of a folder."""
    fingerprint = Fingerprint.of(checkpoint)
    content = json.dumps([fingerprint.config, fingerprint.tensors], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
