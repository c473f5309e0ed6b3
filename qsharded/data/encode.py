"""From rendered text to ids, and which of them are trained on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qsharded.data.chat import Span
from qsharded.data.examples import Example
from qsharded.data.render import Rendered
from qsharded.data.tokenizer import Tokenizer


def encode(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[Example]:
    """An example for each text. An id is trained on if some of its text is inside a span that is, as in transformers:
    one that begins with the header's last space and goes on with the answer's first word is the answer's."""
    encoded = tokenizer.encode_with_starts([one.text for one in rendered])
    return [_example(one, ids, starts, tokenizer) for one, (ids, starts) in zip(rendered, encoded, strict=True)]


def _example(rendered: Rendered, ids: list[int], starts_T: NDArray[np.int32], tokenizer: Tokenizer) -> Example:
    if rendered.prompt:
        ids, trained = _behind_prompt(rendered, ids, tokenizer)
    else:
        trained = _inside(rendered.spans, starts_T).tolist()
    if rendered.bos:
        ids = tokenizer.with_bos(ids)
        trained = [False] * (len(ids) - len(trained)) + trained
    if rendered.eos and ids[-1] not in tokenizer.eos_ids:
        ids, trained = [*ids, tokenizer.eos_id], [*trained, True]
    return Example(ids, trained)


def _behind_prompt(rendered: Rendered, ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The prompt's ids are those that generation will be given, even where its end and the rest would merge."""
    prompt = tokenizer.encode(rendered.prompt)
    if ids[: len(prompt)] != prompt:
        ids = prompt + tokenizer.encode_continuation(rendered.text[len(rendered.prompt) :])
    return ids, [number >= len(prompt) for number in range(len(ids))]


def _inside(spans: Sequence[Span] | None, starts_T: NDArray[np.int32]) -> NDArray[np.bool_]:
    inside_T = np.full(len(starts_T), spans is None)
    ends_T = np.append(starts_T[1:], np.iinfo(np.int32).max)
    for start, end in spans or ():
        if start < end:
            inside_T |= (starts_T < end) & ((starts_T >= start) | (ends_T > start))
    return inside_T
