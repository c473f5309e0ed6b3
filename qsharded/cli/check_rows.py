"""Rows of tokens to compare two models on: text of several kinds, so that many of a model's weights have their say."""

import torch
from torch import Tensor

from qsharded.data import Tokenizer

_LONGEST = 64
_TEXTS = (
    "The harbour was quiet before sunrise. Two boats had come in during the night, and their crews were asleep below "
    "deck, while the keeper of the light walked down the stairs, counted the lamps that were still burning, and wrote "
    "the number into the book that lay open on his table beside a cup of cold tea.",
    "def mean_and_spread(values):\n    if not values:\n        raise ValueError('no values')\n    mean = sum(values) / "
    "len(values)\n    spread = sum((value - mean) ** 2 for value in values) / len(values)\n"
    "    return mean, spread ** 0.5\n\n\nfor name, column in table.items():\n"
    "    print(name, *mean_and_spread(column))\n",
    "Question: A train leaves at 9:40 and arrives at 12:05. It stops for 15 minutes on the way. How long is it moving?"
    "\nAnswer: From 9:40 to 12:05 it is 2 hours and 25 minutes, which are 145 minutes. Without the stop of 15 minutes "
    "it moves for 130 minutes, that is, 2 hours and 10 minutes.",
    "Der Wald liegt hinter dem Dorf, und wer früh genug aufsteht, sieht die Rehe am Rand der Wiese stehen. Im Herbst "
    "sammeln die Kinder dort Kastanien; im Winter ziehen sie ihre Schlitten den Hang hinauf, bis es dunkel wird und "
    "jemand aus dem letzten Haus nach ihnen ruft.",
    '{"order": 4711, "customer": {"name": "Ada", "city": "Turin"}, "items": [{"article": "lamp", "count": 2, "price": '
    '39.5}, {"article": "cable", "count": 5, "price": 3.2}], "paid": true, "note": null, "sent": "2024-03-08"}',
    "# Sourdough\n\n1. Feed the starter in the evening and leave it on the counter.\n2. In the morning mix 500 g of "
    "flour with 350 g of water, and wait for half an hour.\n3. Add 100 g of starter and 10 g of salt, fold the dough "
    "four times in two hours, and let it rise until it has doubled.\n",
    "User: My printer says that it is out of paper, but the tray is full. What should I try?\nAssistant: Take the tray "
    "out, fan the sheets and push it back until it clicks. If the message stays, clean the rollers with a damp cloth: "
    "worn or dusty ones slip, and the printer then believes that there is no paper.",
    "The theorem says that every bounded sequence of real numbers has a convergent subsequence. To see it, halve the "
    "interval that holds the sequence again and again, and keep a half that holds infinitely many of its terms. The "
    "ends of these intervals converge to one point, and from each interval we pick a later term.",
)
MOST_ROWS = len(_TEXTS)


def check_rows(tokenizer: Tokenizer | None, count: int, vocab_size: int, longest: int) -> Tensor:
    """``count`` rows of ids [R, S], int64: texts that are cut to the shortest of them, to 64 tokens and to ``longest``.

    Without a tokenizer, or where it is another model's, whose ids go beyond ``vocab_size``, they are random.
    """
    rows = [tokenizer.with_bos(tokenizer.encode(text)) for text in _TEXTS[:count]] if tokenizer is not None else []
    length = min([_LONGEST, longest, *map(len, rows)])
    if not rows or length == 0 or max(map(max, rows)) >= vocab_size:
        return torch.randint(vocab_size, (count, min(_LONGEST, longest)), generator=torch.Generator().manual_seed(0))
    return torch.tensor([row[:length] for row in rows])
