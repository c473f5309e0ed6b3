"""The tokenizer that answers: the one of the adapter's training, unless options say otherwise."""

import logging
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsharded.cli.answering import read_tokenizer
from qsharded.data import Tokenizer
from qsharded.data.template_options import TemplateOptions
from qsharded.training import setup
from tests.data.folders import chat, make_folder

SOURCE = "{{ level }}{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"


def options(**given: Any) -> Any:
    return SimpleNamespace(**{"chat_template": None, "chat_template_kwargs": {}, "template_date": None} | given)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model, adapter = make_folder(tmp_path / "model", template=SOURCE), tmp_path / "adapter"
    adapter.mkdir()
    Tokenizer.from_folder(model, TemplateOptions(None, {"level": 3}, date(2024, 2, 29))).copy_files(adapter)
    return model, adapter


def test_an_adapter_is_asked_as_it_was_trained(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    model, adapter = folders
    with caplog.at_level(logging.INFO):
        assert read_tokenizer(options(), model, adapter).render(chat("a")) == "3user:a</s>"
        assert read_tokenizer(options(), model, None).render(chat("a")) == "user:a</s>"
    assert not caplog.messages


def test_what_is_otherwise_is_told(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    model, adapter = folders
    with caplog.at_level(logging.INFO):
        config = options(chat_template_kwargs={"level": 4})
        assert read_tokenizer(config, model, adapter).render(chat("a")) == "4user:a</s>"
        assert read_tokenizer(config, model, None).render(chat("a")) == "4user:a</s>"
    assert caplog.messages == [
        "note: the adapter was trained with other variables of the chat template: level=3, date 2024-02-29; here: "
        "level=4, date 2024-02-29"
    ]


def test_a_run_that_goes_on_from_an_adapter_tells_what_is_otherwise(folders: tuple[Path, Path]) -> None:
    model, adapter = folders
    same = TemplateOptions(None, {"level": 3}, date(2024, 2, 29))

    def note(tokenizer: Tokenizer) -> str | None:
        base = SimpleNamespace(folder=model, adapter=adapter, tokenizer=tokenizer)
        return setup._template_note(base)  # type: ignore[arg-type]

    assert note(Tokenizer.from_folder(model, same)) is None
    other = "note: the adapter was trained with other variables of the chat template"
    told = f"{other}: level=3, date 2024-02-29; here: none"
    assert note(Tokenizer.from_folder(model)) == told
    (adapter / "tokenizer.json").unlink()  # as in a run's checkpoints
    assert note(Tokenizer.from_folder(model)) == told
    assert note(Tokenizer.from_folder(model, same)) is None
    (adapter / "chat_template_options.json").unlink()
    assert note(Tokenizer.from_folder(model)) is None, "an adapter without a tokenizer says nothing of it"


@pytest.mark.parametrize("variables", [{}, {"level": 3}])
def test_the_adapter_of_a_checkpoint_is_asked_as_it_was_trained(tmp_path: Path, variables: dict[str, Any]) -> None:
    model = make_folder(tmp_path / "model", template=SOURCE)
    (tmp_path / "mine.jinja").write_text("mine {{ level }}")
    trained = Tokenizer.from_folder(model, TemplateOptions(tmp_path / "mine.jinja", variables))
    (adapter := tmp_path / "adapter").mkdir()
    for name, content in trained.template_files.items():
        (adapter / name).write_bytes(content)
    assert read_tokenizer(options(), model, adapter).render(chat("a")) == trained.render(chat("a"))
    other = read_tokenizer(options(chat_template_kwargs={"level": 5}), model, adapter)
    assert other.render(chat("a")) == "mine 5"
