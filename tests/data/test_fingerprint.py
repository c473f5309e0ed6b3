"""Fingerprints of training rows tell equal rows from others, and say where the first other one is."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from qsharded.data.examples import Example
from qsharded.data.fingerprint import RowsFingerprint


def rows(count: int) -> list[Example]:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 9, count)
    return [Example(random.integers(0, 50, length), random.integers(0, 2, length)) for length in lengths]


def difference(then: list[Example], now: list[Example]) -> str | None:
    before = RowsFingerprint.from_json(RowsFingerprint.of(then, []).to_json())
    return before.difference(RowsFingerprint.of(now, [], before.run))


def other_id(row: Example) -> Example:
    return Example(np.append(row.ids[:-1], row.ids[-1] + 1), row.trained)


def other_mask(row: Example) -> Example:
    return Example(row.ids, np.append(row.trained[:-1], ~row.trained[-1]))


@pytest.mark.parametrize(("change", "what"), [(other_id, "ids"), (other_mask, "loss masks")])
@pytest.mark.parametrize("place", [0, 6, 11])
def test_a_single_other_row_is_named(change, what: str, place: int) -> None:
    then, now = rows(12), rows(12)
    assert difference(then, now) is None
    now[place] = change(now[place])
    assert difference(then, now) == f"the first whose {what} differ is row {place + 1}"


def test_in_many_rows_it_is_narrowed_down_to_one_in_256() -> None:
    then, now = rows(1000), rows(1000)
    now[517] = other_id(now[517])
    assert len(RowsFingerprint.of(then, []).ids) == 250  # four rows each
    assert difference(then, now) == "the first whose ids differ is among rows 517 to 520"


def test_fewer_and_more_rows_are_counted() -> None:
    assert difference(rows(12), rows(12)[:9]) == "9 rows, there were 12; those in both are the same"
    assert difference(rows(12)[:9], rows(12)) == "12 rows, there were 9; those in both are the same"
    found = difference(rows(12), rows(12)[1:])
    assert found == "11 rows, there were 12; the first whose ids differ is row 1"


def test_checkpoints_of_before_are_compared_as_they_were_written() -> None:
    """They name no version; their hashes are of all that the rows hold."""
    then, now = rows(12), rows(12)
    before = RowsFingerprint.of(then, [], version=1).to_json()
    assert (
        before["ids"][0] == hashlib.sha256(bytes([4 * len(then[0])] + [0] * 7) + then[0].ids.tobytes()).hexdigest()[:16]
    )
    del before["version"]
    now[6] = other_id(now[6])
    found = RowsFingerprint.from_json(before).difference(RowsFingerprint.like(now, [], before))
    assert found == "the first whose ids differ is row 7"
    assert RowsFingerprint.like(then, [], before).ids == before["ids"]


def test_order_and_borders_of_rows_count() -> None:
    then = rows(6)
    assert difference(then, then[::-1]) == "the first whose ids differ is row 1"
    joined = [Example(np.arange(4), np.ones(4)), Example(np.arange(4, 9), np.ones(5))]
    cut = [Example(np.arange(5), np.ones(5)), Example(np.arange(5, 9), np.ones(4))]
    assert RowsFingerprint.of(joined, [], 2).ids != RowsFingerprint.of(cut, [], 2).ids


def test_the_tokenizers_files_explain_and_do_not_decide(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "chat_template.jinja").write_text(name)
    one, other = (RowsFingerprint.of(rows(3), sorted((tmp_path / name).iterdir())) for name in ("one", "other"))
    assert one.difference(other) is None
    assert one.changed_tokenizer_files(other) == ["chat_template.jinja"]
