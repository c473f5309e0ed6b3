import json
import shutil

import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from qsharded.data import Tokenizer
from tests.data import templates
from tests.data.folders import chat, make_folder

TEXTS = [
    "Hello, the quick  fox!\n\n  é日👩‍👧 2+2?",
    "",
    " ",
    "\n\n",
    "<s>the<|im_end|> dog</s>",
    "assistant:",
    "a\u00adb\x00c",
]
KINDS = ["byte-level", "byte-level-bos", "metaspace"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(tmp_path, kind):
    folder = make_folder(tmp_path, kind)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("told", [None, False])
def test_bos_is_added_where_transformers_adds_it(tmp_path, kind, told):
    folder = make_folder(tmp_path, kind, add_bos_token=told)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    assert ours.adds_bos is (theirs("the dog")["input_ids"][0] == theirs.bos_token_id)
    assert ours.bos_id == theirs.bos_token_id


def test_bos_is_added_where_the_config_says_so(tmp_path):
    assert Tokenizer.from_folder(make_folder(tmp_path, add_bos_token=True)).adds_bos


def test_a_tokenizer_without_bos_adds_none(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, bos_token=None, add_bos_token=True))
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_are_the_tokens_own(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, kind))
    text = "the dog :  é<s> x\n\n  y"
    (encoded,) = tokenizer.encode_all([text])
    ids, starts = encoded.ids, [encoded.start(number) for number in range(len(encoded))]
    assert [encoded.first_from(at) for at in range(len(text) + 2)] == [
        sum(start < at for start in starts) for at in range(len(text) + 2)
    ]
    assert starts == [start for start, _ in tokenizer._backend.encode(text, add_special_tokens=False).offsets]
    assert ids == tokenizer.encode(text)
    for token, start, end in zip(ids, starts, [*starts[1:], len(text)], strict=True):
        if start < end and text[start:end].isascii():  # not the bytes of one letter, which share its start
            assert tokenizer.decode([token]) == text[start:end] or kind == "metaspace"
            assert tokenizer.decode([token]).strip() == text[start:end].strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["dog", " dog", "the dog\n", "<|im_end|>", ""])
def test_a_continuation_has_no_space_of_its_own(tmp_path, kind, text):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, kind))
    assert tokenizer.decode([*tokenizer.encode("fox"), *tokenizer.encode_continuation(text)]) == "fox" + text


@pytest.mark.parametrize("as_object", [False, True])
def test_named_tokens(tmp_path, as_object):
    named = {"eos_token": "<|eot_id|>", "pad_token": "<|user|>"}
    folder = make_folder(tmp_path, **{key: {"content": text} if as_object else text for key, text in named.items()})
    tokenizer = Tokenizer.from_folder(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.eos_id == backend.token_to_id("<|eot_id|>")
    assert tokenizer.pad_id == backend.token_to_id("<|user|>")


def test_named_tokens_of_the_special_tokens_map(tmp_path):
    folder = make_folder(tmp_path, eos_token=None)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<|user|>"}')
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1), "the config wins"
    assert tokenizer.pad_id == tokenizer.eos_id


def test_eos_ids_are_the_tokenizers_the_models_and_the_templates(tmp_path):
    folder = make_folder(tmp_path, template=templates.CHATML)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    end_of_turn = backend.token_to_id("<|im_end|>")
    assert Tokenizer.from_folder(folder).eos_ids == (1, end_of_turn)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_folder(folder).eos_ids == (1, 7, end_of_turn)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    assert Tokenizer.from_folder(folder).eos_ids == (1, 9, end_of_turn)
    assert Tokenizer.from_folder(make_folder(tmp_path / "bare")).eos_ids == (1,)


def test_eos_may_come_from_the_models_files_alone(tmp_path):
    folder = make_folder(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="names no eos_token"):
        Tokenizer.from_folder(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert Tokenizer.from_folder(folder).eos_id == 5


def test_truncation_and_padding_left_in_the_file_are_off(tmp_path):
    folder = make_folder(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    whole = backend.encode("the dog " * 20, add_special_tokens=False).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the dog " * 20) == whole
    assert tokenizer.encode("") == []


def test_tokens_that_only_the_config_adds(tmp_path):
    size = Backend.from_file(str(make_folder(tmp_path / "plain") / "tokenizer.json")).get_vocab_size()
    added = {str(size): {"content": "<|new|>", "special": True, "normalized": False}, "0": {"content": "<s>"}}
    folder = make_folder(tmp_path / "added", added_tokens_decoder=added)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a<|new|>") == theirs("a<|new|>")["input_ids"]
    assert tokenizer.encode("<|new|>") == [size]
    folder = make_folder(tmp_path / "odd", added_tokens_decoder={str(size + 5): {"content": "<|new|>"}})
    with pytest.raises(ValueError, match=rf"adds '<\|new\|>' as {size + 5}, for which .*tokenizer\.json has no room"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["CHATML", "CHATML_MARKED", "LLAMA3", "MISTRAL"])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("kind", ["byte-level-bos", "metaspace"])
def test_chat_ids_are_those_of_transformers(tmp_path, name, prompt, kind):
    folder = make_folder(tmp_path, kind, getattr(templates, name))
    tokenizer, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    messages = chat("the quick dog?", "it rests.", "and then", " of course!\n", "é", system="be kind")
    messages = messages[: len(messages) - (not prompt)]
    ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=prompt))
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert ids.count(tokenizer.bos_id) == ("bos_token" in getattr(templates, name)), "no double BOS"


def test_templates_by_name(tmp_path):
    entry = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, template=entry))
    assert tokenizer.render(chat("a")) == "plain"
    assert tokenizer.render(chat("a"), tools=[{"name": "f"}]) == "tools"


def test_template_files_win(tmp_path):
    folder = make_folder(tmp_path, template="entry")
    assert Tokenizer.from_folder(folder).render(chat("a")) == "entry"
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tool file")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render(chat("a")) == "file"
    assert tokenizer.render(chat("a"), tools=[{}]) == "tool file"


def test_without_a_template_the_error_tells_what_to_do(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(
        ValueError, match=r"has no default chat template.*instruction-tuned.*chat_template\.jinja.*prompt"
    ):
        tokenizer.render(chat("a"))


def test_files_make_the_same_tokenizer_elsewhere(tmp_path):
    folder = make_folder(tmp_path / "model", "byte-level-bos", template=templates.MISTRAL)
    (folder / "chat_template.jinja").write_text(templates.CHATML)
    (folder / "model.safetensors").touch()
    (tmp_path / "copy").mkdir()
    for path in Tokenizer.from_folder(folder).files:
        shutil.copy(path, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    copy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    tokenizer = Tokenizer.from_folder(folder)
    messages = chat("a", "b")
    assert copy.apply_chat_template(messages)["input_ids"] == tokenizer.encode(tokenizer.render(messages))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, r"has no tokenizer\.json.*save_pretrained"),
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json must hold a JSON object, got list"),
    ],
)
def test_damaged_folders(tmp_path, name, content, reason):
    folder = make_folder(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_folder(folder)


def test_special_tokens_may_be_skipped_in_decoding(tmp_path):
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path))
    ids = tokenizer.encode("<s>the dog<|im_end|>")
    assert tokenizer.decode(ids) == "<s>the dog<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the dog"


def test_the_config_need_not_be_there(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert Tokenizer.from_folder(folder).eos_id == 1
