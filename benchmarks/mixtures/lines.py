"""The lines of the record.

python -m benchmarks.mixtures.lines NAME FOLDER RESULT [--short]    # one of them, in this process
"""

from typing import Any

from benchmarks.mixtures.shapes import (
    DEEPSEEK_V2_LITE,
    GLM_4_5_AIR,
    GLM_4_7_FLASH,
    GPT_OSS_20B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    TINY,
    TINY_LATENT,
)
from benchmarks.two_gpus.large import Large, line
from benchmarks.two_gpus.line import Line, run_one

# on a GPU with room layers would stay gathered from forward to backward
OFFLOADED = {"activation_checkpointing": "offloaded", "lora_dtype": "bfloat16", "lora_r": 16}
OFFLOADED |= {"reshard_after_forward": "always"}
RANK_8 = OFFLOADED | {"lora_r": 8}


def _mixture(name: str, shape: dict[str, Any], ranks: int, rows: int, length: int, **rest: Any) -> Large:
    settings: dict[str, Any] = {"accumulation": 1, "steps": 6, "options": OFFLOADED, "tiny": TINY} | rest
    return Large(name, shape, ranks, rows, length, **settings)


MIXTURES = (
    _mixture("30b-one-gpu", QWEN3_30B_A3B, 1, 4, 2048, accumulation=2, least_speed=10_000.0, most_gib=23.0),
    _mixture("gpt-oss-20b", GPT_OSS_20B, 1, 1, 4096, most_gib=17.0),
    _mixture("30b-two-gpus", QWEN3_30B_A3B, 2, 4, 2048, like="30b-one-gpu", of_its_speed=0.85, most_gib=13.0),
    _mixture("glm-4.5-air", GLM_4_5_AIR, 2, 1, 2048, options=RANK_8, most_gib=40.0),
    _mixture("qwen3-235b", QWEN3_235B_A22B, 2, 1, 2048, options=RANK_8, most_gib=80.0, limit_s=200),
    _mixture("glm-4.7-flash", GLM_4_7_FLASH, 1, 4, 2048, tiny=TINY_LATENT),
    _mixture("deepseek-v2-lite", DEEPSEEK_V2_LITE, 1, 4, 2048, tiny=TINY_LATENT),
)


def lines(short: bool = False) -> list[Line]:
    """All of them; ``short`` makes them small."""
    return [line(case, short) for case in MIXTURES]


if __name__ == "__main__":
    run_one(lines)
