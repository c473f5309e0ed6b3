"""The preview's command, and that a run begins with the same."""

import json
from pathlib import Path

import pytest

from qsharded import preview, train
from tests.checkpoints import write_chat_checkpoint
from tests.data.folders import chat, write_rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_chat_checkpoint(tmp_path / "model")


def rows(tmp_path: Path, *more: str) -> Path:
    path = write_rows(tmp_path / "rows.jsonl", *({"messages": chat(f"q{number}", "dog")} for number in range(4)))
    path.write_text(path.read_text() + "".join(line + "\n" for line in more))
    return path


def test_a_run_begins_with_what_the_preview_shows(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model), "--dataset", str(rows(tmp_path)), "--show-rows", "3", "--show-characters", "40"]
    preview.main(flags)
    shown = capsys.readouterr().out
    assert shown.count("--- row ") == 3
    assert "[[" in shown
    train.main([*flags, "--output-dir", str(tmp_path / "out"), "--max-steps", "1", "--save-steps", "0"])
    assert shown in capsys.readouterr().out


def test_it_reads_no_weights_and_no_datasets_but_those_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    dataset = str(rows(tmp_path))
    preview.main(["--model", str(model), "--dataset", dataset, dataset, "--eval-dataset", dataset])
    shown = capsys.readouterr().out
    assert shown.count(f"\ndata {dataset}: 4 rows") + shown.startswith(f"data {dataset}: 4 rows") == 2
    assert f"\nevaluation data {dataset}: 4 rows" in shown


@pytest.mark.parametrize(("option", "status"), [("stop", 1), ("skip:1", 1), ("skip:2", 0)])
def test_bad_rows_are_listed_and_the_others_shown(
    tmp_path: Path, model: Path, option: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path, "nope", json.dumps({"messages": chat("a")}))
    flags = ["--model", str(model), "--dataset", str(path), "--bad-rows", option]
    if status:
        with pytest.raises(SystemExit, match="1"):
            preview.main(flags)
    else:
        preview.main(flags)
    said = capsys.readouterr()
    assert f"data {path}: 4 rows of up to 2048 tokens, 2 bad and left out" in said.out
    assert f"{path}:5: not JSON" in said.out
    assert f"{path}:6: the conversation has no message of the assistant to learn" in said.out
    assert ("2 rows cannot be used" in said.err) == bool(status)


def test_where_every_row_is_bad_they_are_listed_too(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("nope\n")
    with pytest.raises(SystemExit, match="1"):
        preview.main(["--model", str(model), "--dataset", str(path)])
    said = capsys.readouterr()
    assert f"data {path}: 0 rows of up to 2048 tokens, 1 bad and left out" in said.out
    assert f"{path}:1: not JSON" in said.err


def test_the_page_is_written(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows(tmp_path)
    preview.main(["--model", str(model), "--dataset", str(path), "--html", str(tmp_path / "p.html")])
    written = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert written.startswith("<!doctype html>")
    assert written.count('class="row"') == 4
    assert str(path) in written
    capsys.readouterr()


def test_the_options_of_the_template_count(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.role + kind + m.content }}</s>{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    flags = ["--model", str(model), "--dataset", str(rows(tmp_path)), "--chat-template", str(tmp_path / "t.jinja")]
    preview.main([*flags, "--chat-template-kwargs", "kind=-"])
    assert "note: the chat template writes today's date" in capsys.readouterr().out
    preview.main([*flags, "--chat-template-kwargs", "kind=-", "--template-date", "2024-02-29"])
    said = capsys.readouterr().out
    assert "note" not in said
    assert "2024-02-29user-q0" in said.replace("</s>", "")


def test_the_adapter_of_a_checkpoint_keeps_the_options_of_the_template(tmp_path: Path, model: Path) -> None:
    flags = ["--model", str(model), "--dataset", str(rows(tmp_path)), "--chat-template-kwargs", "level=3"]
    train.main([*flags, "--output-dir", str(tmp_path / "out"), "--max-steps", "1"])
    (kept,) = (tmp_path / "out" / "checkpoints").glob("*/adapter/chat_template_options.json")
    assert json.loads(kept.read_text())["variables"] == {"level": 3}


def test_rows_of_prompts_are_looked_at_too(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "completion": "b"}\nnope\n')
    flags = ["--model", str(model), "--dataset", str(rows(tmp_path)), "--exact-match-dataset", str(prompts)]
    with pytest.raises(SystemExit, match="1"):
        preview.main(flags)
    said = capsys.readouterr()
    assert f"prompts {prompts}: 1\nnote: 1 bad row is left out (--bad-rows):\n  {prompts}:2: not JSON" in said.out
    assert f"{prompts}:2: not JSON: Expecting value at column 1 (--bad-rows skip:1 goes on without it)" in said.err
    preview.main([*flags, "--bad-rows", "skip:1"])
