"""Prompts with their answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from qsharded.data import Dataset, Tokenizer, load_prompts
from qsharded.data.bad_rows import SHOWN
from tests.checkpoints import write_chat_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_chat_checkpoint(tmp_path_factory.mktemp("model")))


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_conversation_is_cut_before_its_last_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    (prompt,) = load_prompts(write(tmp_path, {"messages": talk}), tokenizer)
    assert tokenizer.decode(prompt.ids) == "<u>a<e><a>b<e><u>c<e><a>"
    assert (prompt.text, prompt.answer) == ("c", "d")


def test_a_completion_is_what_follows_its_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (prompt,) = load_prompts(write(tmp_path, {"prompt": "abc", "completion": "de"}), tokenizer)
    assert (tokenizer.decode(prompt.ids), prompt.text, prompt.answer) == ("abc", "abc", "de")


@pytest.mark.parametrize(
    "row", [{"text": "abc"}, {"messages": [message("user", "a")]}, {"messages": [message("assistant", "a")]}]
)
def test_a_row_without_prompt_or_answer_is_named(tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: a prompt with its answer needs"):
        load_prompts(write(tmp_path, good, row), tokenizer)


def test_bos_comes_once(tmp_path: Path) -> None:
    folder = write_chat_checkpoint(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>", "add_bos_token": True}))
    tokenizer = Tokenizer.from_folder(folder)
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "<s>ab", "completion": "c"}]
    prompts = load_prompts(write(tmp_path, *rows), tokenizer)
    assert [tokenizer.decode(prompt.ids) for prompt in prompts] == ["<s>ab", "<s>ab"]


def test_bad_rows_are_listed_at_once_or_skipped_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "completion": "b"}, {"text": "abc"}, {"prompt": "c", "completion": "d"})
    path.write_text("nope\n" + path.read_text())
    with pytest.raises(ValueError, match="2 rows cannot be used") as raised:
        load_prompts(path, tokenizer, skip_bad_rows=1)
    _, first, second, last = str(raised.value).splitlines()
    assert first.startswith(f"  {path}:1: not JSON")
    assert second.startswith(f"  {path}:3: a prompt with its answer needs")
    assert last == "(--bad-rows skip:2 goes on without them)"
    counted = Dataset([])
    prompts = load_prompts(path, tokenizer, skip_bad_rows=2, counted=counted)
    assert [prompt.answer for prompt in prompts] == ["b", "d"]
    assert (counted.bad, counted.bad_reasons[0]) == (2, first.strip())


def test_more_bad_rows_than_are_listed_may_be_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, *[{"text": "abc"}] * (SHOWN + 1), {"prompt": "a", "completion": "b"})
    assert len(load_prompts(path, tokenizer, skip_bad_rows=SHOWN + 1)) == 1
    with pytest.raises(ValueError, match=f"at least {SHOWN} rows cannot be used"):
        load_prompts(path, tokenizer)


def test_what_a_prompt_lacks_is_told(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_chat_checkpoint(tmp_path))
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    talk = [message("user", "a"), call, message("user", "c"), message("assistant", "d")]
    path, told = write(tmp_path, {"messages": talk}), Dataset([])
    load_prompts(path, tokenizer, counted=told)
    assert told.omitted["tool calls"].example == f"{path}:1, message 1: 'f'"


def test_misspelt_columns_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "said": "b", "completion": "c"})
    columns = {"completion": "said", "prompt": "asked"}
    with pytest.raises(ValueError, match="prompt=asked: no row has a column 'asked'"):
        load_prompts(path, tokenizer, columns=columns)
