"""Words of eight 4-bit codes to the codebook's 16-bit values, in registers: three ways, to choose from by measurement.

``permute`` takes the values' bytes from registers by ``prmt``, which needs no memory; ``gather`` looks each code up in
shared memory, where sixteen entries meet no bank conflict; ``pairs`` looks both codes of a byte up at once, in a table
of 256 pairs, where they do.

Axes: R = words of codes, of any shape; the eight values of a word are three axes of 2 behind it, code 4a + 2b + c at
[..., a, b, c].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks

CODES = tl.constexpr(checks.CODES)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as triton.jit found it

DECODERS = ("permute", "gather", "pairs")


def lookups(codebook: Tensor) -> Tensor:
    """int32 [8 + 16 + 256] of a codebook [16] in 16 bits, for ``decode``: the values' lower bytes, four a word, and
    their upper ones; their bits; the pairs of values by byte, the high nibble's in the lower half."""
    bits = codebook.view(torch.int16).int() & 0xFFFF
    shift = torch.arange(4, device=bits.device, dtype=torch.int32) * 8
    low, high = ((byte.view(4, 4) << shift).sum(1, dtype=torch.int32) for byte in (bits & 255, bits >> 8))
    pairs = bits[:, None] | (bits[None, :] << 16)
    return torch.cat([low, high, bits, pairs.flatten()]).contiguous()


@triton.jit
def tables(lookups_ptr, DECODER: tl.constexpr):
    """What ``decode`` looks words up in, once for all of them."""
    if DECODER == "gather":
        return tl.load(lookups_ptr + 8 + tl.arange(0, CODES))
    elif DECODER == "pairs":
        return tl.load(lookups_ptr + 8 + CODES + tl.arange(0, CODES * CODES))
    else:
        word = tl.arange(0, 8)
        loaded = tl.load(lookups_ptr + word)
        return (
            _element(loaded, word, 0),
            _element(loaded, word, 1),
            _element(loaded, word, 2),
            _element(loaded, word, 3),
            _element(loaded, word, 4),
            _element(loaded, word, 5),
            _element(loaded, word, 6),
            _element(loaded, word, 7),
        )


@triton.jit
def _element(values, index, i: tl.constexpr):
    """The i-th, which the compiler must not know to be the same in all lanes: ``prmt`` does not take two operands from
    uniform registers, and to move one took an instruction a weight."""
    return tl.sum(tl.where(index == i, values, 0))


@triton.jit
def decode(word, tables, DTYPE: tl.constexpr, DECODER: tl.constexpr):
    """The values [R, 2, 2, 2] of words [R] in ``DTYPE``, bf16 or fp16; while numpy interprets, in fp32."""
    # shapes are joined by +: Triton knows no * in a list
    if DECODER == "gather":
        bits = tl.gather(tables, codes_of(word).reshape(word.numel * 8), 0)
        return _value(bits, DTYPE).reshape(word.shape + [2, 2, 2])  # noqa: RUF005
    elif DECODER == "pairs":
        byte = tl.join(tl.join(word & 255, (word >> 16) & 255), tl.join((word >> 8) & 255, (word >> 24) & 255))
        pairs = tl.gather(tables, byte.reshape(word.numel * 4), 0).reshape(word.shape + [2, 2])  # noqa: RUF005
        return tl.join(_value(pairs, DTYPE), _value(pairs >> 16, DTYPE))
    else:
        shifted = word << 4  # an even nibble's highest bit is a byte's here, and an odd one's in the word itself
        code = word & 0x77777777  # a selector's highest bit would ask for a sign
        first, second = _pairs_of_four(code, _byte_permute(word, shifted, 0x9D8C), tables)
        third, fourth = _pairs_of_four(code >> 16, _byte_permute(word, shifted, 0xBFAE), tables)
        return _of_pairs(first, second, third, fourth, DTYPE)


@triton.jit
def codes_of(word):
    """The codes [R, 2, 2, 2]: a byte's first is its high nibble."""
    return _by_three_axes(
        (word >> 4) & 15,
        word & 15,
        (word >> 12) & 15,
        (word >> 8) & 15,
        (word >> 20) & 15,
        (word >> 16) & 15,
        (word >> 28) & 15,
        (word >> 24) & 15,
    )


@triton.jit
def _by_three_axes(v0, v1, v2, v3, v4, v5, v6, v7):
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    return tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def _of_pairs(first, second, third, fourth, DTYPE: tl.constexpr):
    """Words that hold two values each, the first in the lower half."""
    return _by_three_axes(
        _value(first, DTYPE),
        _value(first >> 16, DTYPE),
        _value(second, DTYPE),
        _value(second >> 16, DTYPE),
        _value(third, DTYPE),
        _value(third >> 16, DTYPE),
        _value(fourth, DTYPE),
        _value(fourth >> 16, DTYPE),
    )


@triton.jit
def _value(bits, DTYPE: tl.constexpr):
    """The number whose bits are the lower half."""
    if not INTERPRETED:
        return bits.to(tl.int16).to(DTYPE, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _pairs_of_four(code, upper, tables):
    """Two words, of the values of four codes: nibble i has the lower bits of one, and byte i of ``upper`` is 255 where
    it is 8 or more."""
    low = (_byte_permute(tables[0], tables[1], code) & ~upper) | (_byte_permute(tables[2], tables[3], code) & upper)
    high = (_byte_permute(tables[4], tables[5], code) & ~upper) | (_byte_permute(tables[6], tables[7], code) & upper)
    return _byte_permute(low, high, 0x4051), _byte_permute(low, high, 0x6273)


@triton.jit
def _byte_permute(low, high, selector):
    """``prmt``: byte i is byte (digit i of the selector, modulo 8) of high:low; its sign throughout from digit 8 on."""
    if INTERPRETED:
        return _byte_permute_by_steps(low, high, selector)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _byte_permute_by_steps(low, high, selector):
    result = (low ^ low) & (selector ^ selector)
    for i in tl.static_range(4):
        digit = (selector >> (4 * i)) & 15
        byte = (tl.where((digit & 4) != 0, high, low) >> ((digit & 3) * 8)) & 255
        byte = tl.where(digit < 8, byte, tl.where(byte < 128, 0, 255))
        result = result | (byte << (8 * i))
    return result
