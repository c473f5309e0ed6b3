"""Made-up pronounceable words, and which of the three data sets each of them belongs to."""

import random
import zlib

ONSETS = [
    *"bcdfghjklmnpqrstvwxyz",
    *("bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "sh", "sl", "sn", "st", "th", "tr"),
]
VOWELS = [*"aeiou", "ai", "ea", "ee", "io", "oo", "ou"]
CODAS = [*"bdgklmnprstx", "ck", "ld", "nd", "ng", "nt", "rk", "rt", "st"]
SHORTEST, LONGEST = 3, 7

# Of every ten words one is held out for the evaluation, two train the skill, the rest pre-train the base.
SPLITS = ("eval", "train", "train") + ("pretrain",) * 7


def split_of(word: str) -> str:
    """The one data set ("eval", "train", "pretrain") that may hold `word`.

    A hash of the word decides, so that the sets are disjoint without any list of words. A word and its mirror image
    share a hash: reversing a word of one set must not show the answer to a word of another.
    """
    key = min(word, word[::-1])
    return SPLITS[zlib.crc32(key.encode()) % len(SPLITS)]


def make_word(rng: random.Random) -> str:
    """One to three syllables, `SHORTEST` to `LONGEST` letters."""
    while True:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3))]
        word = "".join(syllables) + rng.choice(["", rng.choice(CODAS)])
        if SHORTEST <= len(word) <= LONGEST:
            return word


def word_of(split: str, rng: random.Random) -> str:
    """A word of that data set."""
    while True:
        word = make_word(rng)
        if split_of(word) == split:
            return word


def distinct_words(split: str, count: int, rng: random.Random) -> list[str]:
    """`count` different words of that data set, in the order drawn."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[word_of(split, rng)] = None
    return list(words)
