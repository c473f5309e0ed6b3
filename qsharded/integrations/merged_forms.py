"""The forms that ``merge`` can write. Their packages are optional, and imported when they are asked for."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qsharded.checkpoint.row_chunks import WeightSource
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.models import ModelConfig

Form = Literal["safetensors", "gguf", "compressed-tensors"]
GgufType = Literal["auto", "f16", "q8_0", "q4_0"]
GGUF_FILE = "model.gguf"


def check_form(form: Form, checkpoint: Path, tokenizer: Path) -> None:
    """Look whether the merged ``checkpoint`` can be written so, before any weight is read.

    Raises:
        ValueError: its package is missing, or the model or the tokenizer is not written in that form.
    """
    if form == "safetensors":
        return
    if find_spec(form.replace("-", "_")) is None:
        raise ValueError(f"--format {form} needs a package that is not installed: pip install 'qsharded[{form}]'")
    if form == "gguf":
        from qsharded.integrations import gguf

        gguf.check_convertible(checkpoint, tokenizer)
    else:
        from qsharded.integrations import compressed_tensors

        compressed_tensors.check_convertible(checkpoint)


def convert(
    form: Form, wanted: GgufType, folder: Path, name: str, config: ModelConfig, source: SafetensorsFolder
) -> WeightSource:
    """Put the checkpoint in ``folder``, which ``source`` reads, into another form. Returns the weights as it has them.

    Args:
        wanted: the matrices' type in GGUF.
        name: the model's, for GGUF.
        config: the model's.
    """
    if form == "gguf":
        from qsharded.integrations.gguf_weights import gguf_weights

        _make_gguf(folder, name, wanted)
        return gguf_weights(folder / GGUF_FILE, config)
    from qsharded.integrations.compressed_tensors import compressed_weights, pack_in_place

    pack_in_place(folder)
    return compressed_weights(folder, source)


def _make_gguf(folder: Path, name: str, wanted: GgufType) -> None:
    """Put one file in the place of the checkpoint in ``folder``."""
    from qsharded.integrations.gguf import write_gguf

    parts = list(folder.iterdir())
    write_gguf(folder, folder / GGUF_FILE, name, wanted)
    for part in parts:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
