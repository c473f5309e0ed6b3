"""The codebooks: the sixteen values that a code stands for, of every 4-bit format by its name.

Source: Dettmers et al., "QLoRA", arXiv:2305.14314 (NF4); bitsandbytes 0.50 (FP4).
"""

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign bit, then three bits of a float. The values do not ascend, and 0 stands there twice.
_FP4 = tuple(twelfths / 12 for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
CODEBOOKS: dict[str, tuple[float, ...]] = {"nf4": _NF4, "fp4": _FP4}
