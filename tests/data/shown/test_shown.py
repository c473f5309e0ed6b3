"""A preview as lines and as a page."""

import html
import io
import re
from html.parser import HTMLParser

import pytest

from qsharded.data import Tokenizer, load_examples
from qsharded.data.shown import text
from qsharded.data.shown.page import page
from qsharded.data.shown.preview import Preview
from tests.data import templates
from tests.data.folders import chat, make_folder, write_rows


def preview(tmp_path, *messages, rows=2, characters=0, template=templates.CHATML, **options):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path / "model", template=template))
    path = write_rows(tmp_path / "rows.jsonl", *({"messages": each} for each in messages))
    dataset = load_examples(path, tokenizer, max_length=200, **options)
    return Preview.of(
        "data x", dataset, tokenizer, max_length=200, one_example_per_answer=False, rows=rows, characters=characters
    )


SYSTEM = "<|im_start|>system\nBe helpful.<|im_end|>\n"
ASKED = SYSTEM + "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"


def test_trained_tokens_stand_in_brackets(tmp_path):
    shown = preview(tmp_path, chat("a", "fox"), rows=1)
    lines = text.lines(shown, text.BRACKETS)
    assert lines[0] == "data x: 1 row of up to 200 tokens"
    assert lines[1] == f"  {shown.statistics.line()}"
    assert lines[-1] == ASKED % "a" + "[[fox<|im_end|>]]\n"
    assert re.fullmatch(r"--- row 1: \d+ tokens, \d+ trained", lines[-2])


def test_trained_tokens_are_coloured_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    marks = text.marks_for(Terminal())
    assert text.lines(preview(tmp_path, chat("a", "fox")), marks)[-1].endswith("\x1b[32mfox<|im_end|>\x1b[0m\n")
    assert text.marks_for(io.StringIO()) is text.BRACKETS
    monkeypatch.setenv("NO_COLOR", "1")
    assert text.marks_for(Terminal()) is text.BRACKETS


def test_a_row_cannot_steer_the_terminal(tmp_path):
    (line,) = text.lines(preview(tmp_path, chat("a", "\x1b[31mfox\r\x9b")), text.BRACKETS)[-1:]
    assert "[[\\x1b[31mfox\\r\\x9b<|im_end|>]]" in line


def test_what_is_told_of_rows_and_bars_of_their_lengths_stand_before_the_rows(tmp_path):
    shown = preview(tmp_path, chat("a", "fox"), chat("b", ""), chat("c " * 200, "d"), chat("e", "dog " * 3))
    lines = text.lines(shown, text.BRACKETS)
    assert lines[0] == "data x: 2 rows of up to 200 tokens, 1 too long and dropped, 1 blank or without an answer"
    first = next(number for number, line in enumerate(lines) if line.startswith("rows as the model"))
    assert any(line.startswith("note: 1 row with empty answers") for line in lines[:first])
    bars = [line for line in lines[:first] if "#" in line]
    assert [re.sub(r" #+", "", bar)[-1] for bar in bars] == ["1", "1"]
    assert all(bar.count("#") == 40 for bar in bars), "the fullest bins"


def test_rows_are_taken_from_all_of_the_dataset(tmp_path):
    shown = preview(tmp_path, *(chat(str(number), "x") for number in range(10)), rows=3)
    assert [row.number for row in shown.rows] == [1, 4, 7]
    assert "user\n3<|im_end|>" in "".join(piece.text for piece in shown.rows[1].pieces)
    assert preview(tmp_path, chat("a", "b"), rows=0).rows == []


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.marked, self.rows, self.tags, self.inside = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.rows.append("")
        if tag == "mark" and "pre" in self.inside:
            self.marked.append("")

    def handle_endtag(self, tag):
        while self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "pre" in self.inside:
            self.rows[-1] += data
            if "mark" in self.inside:
                self.marked[-1] += data


@pytest.mark.parametrize("answer", ["fox", "<b>&amp;</pre><script>alert(1)</script>", "\"'<mark>"])
def test_the_page_has_the_rows_as_they_are_and_needs_nothing_else(tmp_path, answer):
    source = page([preview(tmp_path, chat("<i>", answer), characters=0)], "t <&")
    parsed = Text()
    parsed.feed(source)
    assert parsed.rows == [ASKED % "<i>" + answer + "<|im_end|>\n"]
    assert parsed.marked == [f"{answer}<|im_end|>"]
    assert f"<title>{html.escape('t <&')}</title>" in source
    assert not [tag for tag, attributes in parsed.tags if {"src", "href"} & attributes.keys() or tag == "script"]
    assert "url(" not in source
    assert "@import" not in source


def test_the_page_tells_what_the_lines_tell(tmp_path):
    shown = preview(tmp_path, chat("a", "fox"), chat("b", ""), chat("e", "dog " * 3))
    source = html.unescape(page([shown], "t"))
    for line in (shown.counts, shown.statistics.line(), *shown.notes):
        assert line in source
    assert source.count('class="bar"') == 2
