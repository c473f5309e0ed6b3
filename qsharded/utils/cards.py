"""GPUs by name: what their data sheets say of memory and speed, for plans of machines that are not here."""

from dataclasses import dataclass
from typing import Literal

CardName = Literal[
    "L4", "A10", "RTX3090", "RTX4090", "RTX5090", "A6000", "L40S", "A100-40GB", "A100-80GB", "H100", "H200", "B200"
]  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory_gib: what PyTorch sees of it; some hundred MiB less than is sold.
        teraflops: dense bf16 products that are summed in fp32, in 1e12 operations a second.
        memory_gb_s: of its memory.
        link_gb_s: into one GPU from the others of its host, one way.
        host_gb_s: to and from host memory, one way.
    """

    memory_gib: float
    teraflops: float
    memory_gb_s: float
    link_gb_s: float
    host_gb_s: float


CARDS: dict[CardName, Card] = {
    "L4": Card(22.0, 121, 300, 25, 25),
    "A10": Card(22.0, 125, 600, 25, 25),
    "RTX3090": Card(23.5, 71, 936, 25, 25),
    "RTX4090": Card(23.5, 165, 1008, 25, 25),
    "RTX5090": Card(31.3, 210, 1792, 50, 50),
    "A6000": Card(47.4, 155, 768, 25, 25),
    "L40S": Card(44.4, 362, 864, 25, 25),
    "A100-40GB": Card(39.4, 312, 1555, 300, 25),
    "A100-80GB": Card(79.1, 312, 2039, 300, 25),
    "H100": Card(79.1, 989, 3352, 450, 50),
    "H200": Card(139.8, 989, 4800, 450, 50),
    "B200": Card(178.3, 2250, 8000, 900, 50),
}


def card_called(name: str) -> Card | None:
    """The card that CUDA calls ``name``, such as "NVIDIA A100-SXM4-80GB"; None where it is none of these."""
    words = name.upper().replace("RTX ", "RTX").replace("RTXA6000", "A6000").replace("-", " ").split()
    found = [card for key, card in CARDS.items() if set(key.upper().split("-")) <= set(words)]
    return found[0] if len(found) == 1 else None
