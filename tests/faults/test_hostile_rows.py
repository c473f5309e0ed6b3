"""Rows that are absurd: each is refused with file and line, and takes no more memory than a line may."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from qsharded.data import load_examples
from qsharded.data.tokenizer import Tokenizer
from tests.data.folders import chat, make_folder
from tests.data.templates import THINKING

GOOD = json.dumps({"text": "hello there"}).encode() + b"\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_folder(tmp_path_factory.mktemp("model"), eos_token="</s>"))


def load(path: Path, tokenizer: Tokenizer) -> Any:
    return load_examples(path, tokenizer, max_length=64)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": ' + b"9" * 5_000 + b"}", "an integer of more than 4,300 digits"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "lists and objects in each other, over 64 levels"),
        (b'{"text": ' + b"[" * 70 + b"]" * 70 + b"}", "lists and objects in each other, over 64 levels"),
        (b"[" * 100_000, "lists and objects in each other, over 64 levels"),
    ],
    ids=["an integer of 5,000 digits", "100,000 brackets", "70 brackets", "open brackets"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_an_absurd_row_is_refused_with_file_and_line(
    tmp_path: Path, tokenizer: Tokenizer, line: bytes, reason: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(GOOD + line + b"\n")
    with pytest.raises(ValueError, match="rows") as refused:
        load(path, tokenizer)
    assert str(refused.value).startswith(f"{path}:2: not readable: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("megabytes", [50, 2_000])
def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path: Path, tokenizer: Tokenizer, megabytes: int) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        file.truncate(megabytes << 20)  # zeros, which take no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the line has more than 33,554,432 bytes"):
        load(path, tokenizer)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_row_that_is_certainly_too_long_is_dropped_before_its_turns_are_looked_for(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=THINKING))
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": chat("a b " * 1_000_000, "c")}, {"messages": chat("a", "c")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = load(path, tokenizer)
    assert (found.dropped, len(found.examples)) == (1, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # KiB; with its turns 1 GiB


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{tmp_path / name}: .*empty"):
        load(tmp_path / name, tokenizer)


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"\x00" * 100 + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"{}"])
def test_a_fake_parquet_file_is_named(tmp_path: Path, tokenizer: Tokenizer, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet: not readable as parquet"):
        load(path, tokenizer)


@pytest.mark.parametrize("row", [{"k" * 5_000_000: 1}, {f"k{n}": 1 for n in range(90_000)}], ids=["one", "many"])
def test_a_complaint_does_not_grow_with_the_rows_keys(tmp_path: Path, tokenizer: Tokenizer, row: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + json.dumps(row).encode() + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the fields fit no known format") as refused:
        load(path, tokenizer)
    assert len(str(refused.value)) < 1_200
    assert " more characters" in str(refused.value)


def test_a_complaint_does_not_grow_with_what_the_template_says(tmp_path: Path) -> None:
    template = "{{ raise_exception('x' * 10000000) }}"
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=template))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": chat("a", "b")}) + "\n")
    with pytest.raises(ValueError, match="the chat template refuses this conversation") as refused:
        load(path, tokenizer)
    assert len(str(refused.value)) < 1_200
