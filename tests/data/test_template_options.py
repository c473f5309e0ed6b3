"""What a user sets of the chat template, against transformers."""

from datetime import date, datetime

import pytest
import transformers.utils.chat_template_utils as theirs
from transformers import PreTrainedTokenizerFast

from qsharded.data import Tokenizer
from qsharded.data.chat import ChatTemplate
from qsharded.data.template_options import TemplateOptions
from tests.data import templates
from tests.data.folders import chat, make_folder

SWITCHED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
    "{{ level }}{{ names | join(',') }}{{ bos_token }}"
)


@pytest.mark.parametrize(
    "variables", [{}, {"enable_thinking": False}, {"enable_thinking": True, "level": 3, "names": ["a", "b"]},
                  {"bos_token": "B"}]
)  # fmt: skip
def test_variables_are_what_transformers_makes_of_them(tmp_path, variables):
    folder = make_folder(tmp_path / "model", template=SWITCHED)
    tokenizer = Tokenizer.from_folder(folder, TemplateOptions(variables=variables))
    expected = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        chat("a"), tokenize=False, add_generation_prompt=True, **variables
    )
    assert tokenizer.render(chat("a"), add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_what_comes_from_the_rows_cannot_be_set(name):
    with pytest.raises(ValueError, match=f"the chat template's variable '{name}' comes from the rows"):
        ChatTemplate(SWITCHED, {name: 1})


def test_a_fixed_date_is_what_transformers_writes_on_that_day(tmp_path, monkeypatch):
    class ThatDay(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 29)

    source = "{{ strftime_now('%d %b %Y') }}" + templates.CHATML
    folder = make_folder(tmp_path / "model", template=source)
    fixed = Tokenizer.from_folder(folder, TemplateOptions(today=date(2024, 2, 29)))
    monkeypatch.setattr(theirs, "datetime", ThatDay)
    expected = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(chat("a"), tokenize=False)
    assert expected.startswith("29 Feb 2024")
    assert fixed.render(chat("a")) == expected
    assert not fixed.writes_today
    assert Tokenizer.from_folder(folder).writes_today
    assert not Tokenizer.from_folder(make_folder(tmp_path / "other", template=templates.CHATML)).writes_today


def test_a_file_takes_the_place_of_every_template_and_goes_with_the_copies(tmp_path):
    both = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "older"}]
    folder = make_folder(tmp_path / "model", template=both)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("old")
    (tmp_path / "mine.jinja").write_text(templates.CHATML, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder, TemplateOptions(file=tmp_path / "mine.jinja"))
    expected = "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    assert tokenizer.render(chat("a"), tools=[{"name": "f"}]) == expected
    (tmp_path / "copy").mkdir()
    tokenizer.copy_files(tmp_path / "copy")
    assert Tokenizer.from_folder(tmp_path / "copy").render(chat("a"), tools=[{"name": "f"}]) == expected
    copied = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    assert copied.apply_chat_template(chat("a"), tokenize=False) == expected


def test_a_file_that_is_not_there_is_named(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model"), TemplateOptions(file=tmp_path / "no.jinja"))
    with pytest.raises(ValueError, match=r"the chat template .*no\.jinja cannot be read"):
        tokenizer.render(chat("a"))


SET = TemplateOptions(variables={"enable_thinking": False, "level": 3}, today=date(2024, 2, 29))
ASKING = "{{ strftime_now('%d %b %Y') }}" + SWITCHED


def adapter_of(tmp_path, options):
    (tmp_path / "adapter").mkdir()
    Tokenizer.from_folder(make_folder(tmp_path / "model", template=ASKING), options).copy_files(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("options", [SET, TemplateOptions(variables=SET.variables), TemplateOptions(today=SET.today)])
def test_what_was_set_goes_with_the_copies(tmp_path, options):
    adapter = adapter_of(tmp_path, options)
    trained = Tokenizer.from_folder(tmp_path / "model", options).render(chat("a"), add_generation_prompt=True)
    assert Tokenizer.from_folder(adapter).render(chat("a"), add_generation_prompt=True) == trained
    assert trained != Tokenizer.from_folder(tmp_path / "model").render(chat("a"), add_generation_prompt=True)
    again = tmp_path / "again"
    again.mkdir()
    Tokenizer.from_folder(adapter, TemplateOptions(variables={"level": 4})).copy_files(again)
    assert TemplateOptions.kept_in(again).variables == {**options.variables, "level": 4}
    assert TemplateOptions.kept_in(again).today == options.today


def test_what_is_set_now_beats_what_was_set_and_the_difference_is_told(tmp_path):
    trained = Tokenizer.from_folder(adapter_of(tmp_path, SET))
    assert Tokenizer.from_folder(tmp_path / "adapter", SET).template_difference(trained) is None
    now = Tokenizer.from_folder(tmp_path / "adapter", TemplateOptions(None, {"level": 5}, date(2025, 1, 1)))
    assert now.render(chat("a")).startswith("01 Jan 2025")
    assert now.template_difference(trained) == (
        "the adapter was trained with other variables of the chat template: enable_thinking=false, level=3, date "
        "2024-02-29; here: enable_thinking=false, level=5, date 2025-01-01"
    )
    (tmp_path / "other.jinja").write_text(templates.CHATML)
    other = Tokenizer.from_folder(tmp_path / "adapter", TemplateOptions(tmp_path / "other.jinja"))
    assert other.template_difference(trained) == "the adapter was trained with another chat template than the one here"


def test_nothing_is_kept_where_nothing_was_set(tmp_path):
    assert not (adapter_of(tmp_path, None) / "chat_template_options.json").exists()


@pytest.mark.parametrize("said", ['{"date": "soon"}', '{"date": 3}', '{"variables": ["a"]}', '{"variables": 1', "[]"])
def test_a_malformed_file_of_what_was_set_is_named(tmp_path, said):
    (adapter_of(tmp_path, SET) / "chat_template_options.json").write_text(said)
    with pytest.raises(ValueError, match=r"adapter/chat_template_options\.json"):
        Tokenizer.from_folder(tmp_path / "adapter")
