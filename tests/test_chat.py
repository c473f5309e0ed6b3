"""Chatting: what the model is given in each turn, what commands do, and who chooses the tokens."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsharded import chat, generate
from qsharded.chat import ChatConfig, Sampling
from qsharded.data import Tokenizer
from tests.adapters import recast, write_adapter
from tests.checkpoints import write_checkpoint
from tests.data.folders import make_folder
from tests.data.templates import CHATML

LIMIT = ["--max-new-tokens", "6", "--dtype", "float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("llama"), template=CHATML)
    return recast(write_checkpoint(folder, vocab_size=512), torch.float32)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), checkpoint)


Talk = Callable[..., list[str]]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """What is printed for lines of a keyboard, the first line of help and notes on cut answers left out."""

    def run(lines: list[str], *flags: Any) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main([*LIMIT, *map(str, flags)])
        printed = capsys.readouterr().out.split("/save FILE, /quit\n", 1)[1]
        return printed.replace("(cut at 6 tokens)\n", "\0").split("\0")

    return run


def rows(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def said(model: Path, text: str, capsys: pytest.CaptureFixture[str], *flags: Any) -> str:
    """What the generate command answers."""
    generate.main([*LIMIT, "--model", str(model), "--prompt", text, *map(str, flags)])
    return capsys.readouterr().out.removesuffix("\n")


def test_an_answer_is_what_generate_says_and_turns_are_remembered(
    checkpoint: Path, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rendered: list[list[dict[str, str]]] = []
    render = Tokenizer.render

    def recorded(self: Tokenizer, messages: list[dict[str, str]], **how: Any) -> str:
        rendered.append(list(messages))
        return render(self, messages, **how)

    monkeypatch.setattr(Tokenizer, "render", recorded)
    saved = tmp_path / "rows.jsonl"
    talk(["What is 2+2?", "And 3+3?", f"/save {saved}"], "--model", checkpoint, "--system", "Be brief.")
    [messages] = rows(saved)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    ours = [seen for seen in rendered if seen[0]["role"] == "system"]  # the tokenizer tries its template too
    assert ours == [messages[:2], messages[:4]]
    assert messages[2]["content"] == said(checkpoint, "What is 2+2?", capsys, "--system", "Be brief.")
    assert messages[2]["content"] != said(checkpoint, "What is 2+2?", capsys)


def test_reset_and_system_begin_anew(checkpoint: Path, talk: Talk, tmp_path: Path) -> None:
    saved = tmp_path / "rows.jsonl"
    lines = ["one", "/reset", "two", f"/save {saved}", "/system Be kind.", "three", f"/save {saved}"]
    talk(lines, "--model", checkpoint)
    assert [[message["content"] for message in row if message["role"] != "assistant"] for row in rows(saved)] == [
        ["two"],
        ["Be kind.", "three"],
    ]


def test_the_adapter_is_switched_off_and_on(
    checkpoint: Path, adapter: Path, talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "rows.jsonl"
    lines = [word for to in ("off", "on") for word in (f"/adapter {to}", "/reset", "Hello?", f"/save {saved}")]
    talk(lines, "--model", checkpoint, "--adapter", adapter)
    without, adapted = (row[1]["content"] for row in rows(saved))
    assert without == said(checkpoint, "Hello?", capsys)
    assert adapted == said(checkpoint, "Hello?", capsys, "--adapter", adapter)
    assert without != adapted


def test_commands_that_cannot_be_done_are_told_and_the_conversation_goes_on(checkpoint: Path, talk: Talk) -> None:
    lines = ["/adapter off", "/sing", "/save", "/save /no/such/folder/rows.jsonl", "/quit", "never read"]
    [printed] = talk(lines, "--model", checkpoint)
    for line, words in zip(
        printed.splitlines(), ["no adapter", "no /sing", "takes a file", "No such file"], strict=True
    ):
        assert words in line


def test_a_conversation_beyond_the_models_positions_is_told(
    checkpoint: Path, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "rows.jsonl"
    printed = "".join(talk(["word " * 3000, f"/save {saved}"], "--model", checkpoint))
    assert "longer than the model can read: /reset" in printed
    assert rows(saved) == [[]]


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        (None, {}, Sampling(0.0, 0, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, {}, Sampling(0.6, 20, 0.95)),
        ({"do_sample": True}, {}, Sampling(1.0, 0, 1.0)),
        ({"temperature": 0.6, "top_k": 20}, {}, Sampling(0.0, 0, 1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20},
            {"temperature": 0.0, "top_p": 0.5},
            Sampling(0.0, 20, 0.5),
        ),
    ],
)
def test_tokens_are_chosen_as_the_model_asks_and_options_beat_it(
    tmp_path: Path, file: dict[str, Any] | None, options: dict[str, Any], expected: Sampling
) -> None:
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert Sampling.of(ChatConfig(model="m", **options), tmp_path) == expected


def test_plain_text_has_no_system_message(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--model", str(checkpoint), "--prompt", "p", "--raw", "--system", "s"])
    assert "--system is a message of a chat" in capsys.readouterr().err
