"""From rendered text to ids, and which of them are trained on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qsharded.data.chat import Span
from qsharded.data.encoded import Encoded
from qsharded.data.examples import Example
from qsharded.data.render import Rendered
from qsharded.data.tokenizer import Tokenizer


def example_of(rendered: Rendered, encoded: Encoded, tokenizer: Tokenizer) -> Example:
    """The example of a complete text, ``encoded``. An id is trained on if some of its text is inside a span that is, as
    in transformers: one that begins with the header's last space and goes on with the answer's first word is the
    answer's."""
    if rendered.prompt:
        ids, trained = _behind_prompt(rendered, encoded.ids, tokenizer)
    else:
        ids, trained = encoded.ids, _inside(rendered.spans, encoded)
    if rendered.bos:
        ids = tokenizer.with_bos(ids)
        trained = np.concatenate([np.zeros(len(ids) - len(trained), np.bool_), trained])
    if rendered.eos and ids[-1] not in tokenizer.eos_ids:
        ids, trained = [*ids, tokenizer.eos_id], np.append(trained, True)
    return Example(encoded.array if ids is encoded.ids else ids, trained)


def _behind_prompt(rendered: Rendered, ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], NDArray[np.bool_]]:
    """The prompt's ids are those that generation will be given, even where its end and the rest would merge."""
    prompt = tokenizer.encode(rendered.prompt)
    if ids[: len(prompt)] != prompt:
        ids = prompt + tokenizer.encode_continuation(rendered.text[len(rendered.prompt) :])
    return ids, np.arange(len(ids)) >= len(prompt)


def _inside(spans: Sequence[Span] | None, encoded: Encoded) -> NDArray[np.bool_]:
    inside = np.full(len(encoded), spans is None)
    for start, end in spans or ():
        if start < end:
            first, behind = _first_reaching(start, encoded), encoded.first_from(end)
            inside[first:behind] = True
    return inside


def _first_reaching(character: int, encoded: Encoded) -> int:
    """The number of the first id whose text reaches behind this character's beginning."""
    first = encoded.first_from(character)
    is_whole = first < len(encoded) and encoded.start(first) == character
    return first if is_whole else max(0, first - 1)
