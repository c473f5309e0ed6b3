"""Other libraries' NF4, behind one interface, where they are installed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMES = ("bitsandbytes", "torchao")

# A peer packs the weight itself: a few codes in a thousand differ, and scales are rounded otherwise. torchao's codebook
# is rounded to four decimals as well.
TOLERANCE = 3e-2


@dataclass(frozen=True)
class Peer:
    """``quantize``: weight -> a packed weight of the peer's own, double-quantized; the others take that."""

    name: str
    quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any], Tensor]
    linear: Callable[[Tensor, Any], Tensor]


def load(names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers among ``names`` that import here, and why the others do not.

    Raises:
        ValueError: a name that is none of ``NAMES``.
    """
    check(names)
    loaders = {"bitsandbytes": _bitsandbytes, "torchao": _torchao}
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            found.append(loaders[name]())
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def check(names: list[str]) -> None:
    """Raise ValueError for a name that is none of ``NAMES``."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--peers: {name!r} is none of {', '.join(NAMES)}")


def _bitsandbytes() -> Peer:
    bnb = importlib.import_module("bitsandbytes")

    def quantize(weight: Tensor) -> Any:
        return bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)

    return Peer(
        "bitsandbytes",
        quantize,
        lambda packed: bnb.functional.dequantize_4bit(*packed),
        lambda x, packed: bnb.matmul_4bit(x, packed[0].t(), quant_state=packed[1]),
    )


def _torchao() -> Peer:
    try:
        nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    except ImportError:
        nf4 = importlib.import_module("torchao.dtypes.nf4tensor")  # where it lay before
    return Peer(
        "torchao",
        lambda weight: nf4.to_nf4(weight, 64, 256),
        lambda packed: packed.get_original_weight(),
        lambda x, packed: nf4.linear_nf4(x, packed),
    )
