"""The order that ``random.shuffle`` gives, in a quarter of its time: ranks shuffle millions of numbers as they start.

Python's generator and its shuffle are the same in all versions, as resuming elsewhere needs. The shuffle exchanges each
number, from the last on, with one before it, which it draws with as few bits as the place has, and again while the draw
is too large. Here these draws are made many at a time: as many as are needed at least, so that none is drawn in vain.
"""

from random import Random

import numpy as np
from numpy.typing import NDArray

from qsharded.data.ragged import Numbers

_WORD_BITS = 32  # the generator's; a draw takes the highest bits of one


def shuffled(count: int, random: Random) -> Numbers:
    """The numbers below ``count`` as ``random.shuffle`` orders them; ``random`` is left as that leaves it."""
    assert count < 1 << _WORD_BITS, "a draw is of one word"
    order = list(range(count))
    at = count - 1
    while at > 0:
        bits = (at + 1).bit_length()
        places = at + 2 - (1 << (bits - 1))  # from here on that have as many bits, each in need of a draw
        for drawn in (_words(places, random) >> (_WORD_BITS - bits)).tolist():
            if drawn <= at:
                order[at], order[drawn] = order[drawn], order[at]
                at -= 1
    return np.array(order, np.int64)


def _words(count: int, random: Random) -> NDArray[np.uint32]:
    content = random.getrandbits(_WORD_BITS * count).to_bytes(_WORD_BITS // 8 * count, "little")
    return np.frombuffer(content, "<u4")
