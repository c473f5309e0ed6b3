"""Bytes that bitsandbytes wrote (make_nf4.py), by name."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def nf4_tensors() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("nf4.safetensors"))
