"""The model cards of a run's adapters, written from its files as they are by then. What fails here is a warning."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsharded.checkpoint.adapter import CARD_FILE, CONFIG_FILE
from qsharded.config import TrainConfig
from qsharded.report.model_card import adapter_card
from qsharded.report.run_files import Run
from qsharded.utils.durable_files import write_whole
from qsharded.utils.untrusted_json import read_json


def write_card(config: TrainConfig, folder: Path, step: int) -> None:
    """Write that of the adapter of ``step`` in ``folder``, or write it anew."""
    try:
        if (text := card_text(config, read_json(folder / CONFIG_FILE), step)) is not None:
            write_whole(folder / CARD_FILE, text.encode())
    except (OSError, ValueError) as error:
        _warn(error)


def card_text(config: TrainConfig, adapter: Mapping[str, Any], step: int) -> str | None:
    """Its text, of an adapter_config.json; None where it cannot be made."""
    try:
        place = {"place": config.push_to_hub} if config.push_to_hub else {}
        return adapter_card(Run.read(Path(config.output_dir)), adapter, step, **place)
    except Exception as error:  # no card is worth a run
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    print(f"warning: no {CARD_FILE} for the adapter: {error}", file=sys.stderr)
