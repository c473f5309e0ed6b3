"""Reading a tokenizer folder: tokenizer.json, tokenizer_config.json, chat templates and what stands beside them."""

from pathlib import Path
from typing import Any

import tokenizers

from qsharded.data.template_options import OPTIONS_FILE, TEMPLATE
from qsharded.utils.regular_files import regular_size
from qsharded.utils.untrusted_json import (
    BOOLEAN,
    MEBIBYTE,
    NULL,
    Kind,
    check,
    integer,
    list_of,
    map_of,
    object_of,
    read_json,
    text,
)

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(TEMPLATE, OPTIONS_FILE, "tokenizer.model", "vocab.json", "merges.txt"),
)
MORE_TEMPLATES = "additional_chat_templates"
_LONGEST_TEMPLATE = 4 * MEBIBYTE  # the longest have some 20,000 bytes
_LONGEST_TOKENIZER = 512 * MEBIBYTE  # those of 250,000 tokens have some 35
_TEXT = text(MEBIBYTE)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ADDED = object_of({"content": _TEXT, **dict.fromkeys(_FLAGS, BOOLEAN)}, "content")
_ID = Kind("a token's id", lambda key: key.isascii() and key.isdecimal() and len(key) < 10)
_TEMPLATE_OF_NAME = object_of({"name": _TEXT, "template": _TEXT}, "name", "template")
_TOKEN = integer(0, (1 << 31) - 1)
_SETTINGS = {
    "added_tokens_decoder": map_of(_ADDED, 1 << 20, key=_ID) | NULL,
    "chat_template": _TEXT | list_of(_TEMPLATE_OF_NAME, 100) | map_of(_TEXT, 100) | NULL,
}
EOS_TOKEN_ID = {"eos_token_id": _TOKEN | list_of(_TOKEN, 1000) | NULL}
"""What generation_config.json and config.json may say of it."""


def present_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that make up its tokenizer."""
    named = [folder / name for name in _FILES]
    return [path for path in named if path.is_file()] + sorted((folder / MORE_TEMPLATES).glob("*.jinja"))


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and special_tokens_map.json where that is silent."""
    settings = optional_json(folder / "special_tokens_map.json") | optional_json(folder / "tokenizer_config.json")
    check(settings, _SETTINGS, str(folder / "tokenizer_config.json"))
    return settings


def special_variables(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like -> their texts."""
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}


def load_backend(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """tokenizer.json with the tokens that tokenizer_config.json adds.

    Raises:
        ValueError: tokenizer.json is missing or unreadable, or an added token cannot have the id it is given.
    """
    path = folder / "tokenizer.json"
    if path.is_file() and path.stat().st_size > _LONGEST_TOKENIZER:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {_LONGEST_TOKENIZER:,}")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json. Older checkpoints get one by "
            "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises nothing narrower, and panics of its Rust are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
    # Some files keep the settings of their last use.
    backend.no_truncation()
    backend.no_padding()
    _add_missing(backend, settings.get("added_tokens_decoder") or {}, path)
    return backend


def _add_missing(backend: tokenizers.Tokenizer, added: dict[str, dict[str, Any]], path: Path) -> None:
    for number, fields in sorted(added.items(), key=lambda item: int(item[0])):
        content = fields["content"]
        if backend.token_to_id(content) is None:
            known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            backend.add_tokens([tokenizers.AddedToken(**{key: fields[key] for key in known if key in fields})])
            if backend.token_to_id(content) != int(number):
                raise ValueError(f"tokenizer_config.json adds {content!r} as {number}, for which {path} has no room")


def read_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Name -> chat template; files win over the entry of tokenizer_config.json, as in transformers."""
    entry = settings.get("chat_template") or {}
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry}
    files = {path.stem: path for path in (folder / MORE_TEMPLATES).glob("*.jinja")}
    if (folder / TEMPLATE).is_file():
        files["default"] = folder / TEMPLATE
    in_files = {name: _template(path) for name, path in files.items()}
    return in_files or ({"default": entry} if isinstance(entry, str) else entry)


def _template(path: Path) -> str:
    """The text of a chat template's file.

    Raises:
        ValueError: it is no file, too large or not UTF-8; the message names it.
    """
    if (size := regular_size(path)) > _LONGEST_TEMPLATE:
        raise ValueError(f"{path} has {size:,} bytes, more than {_LONGEST_TEMPLATE:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, empty if there is no such file.

    Raises:
        ValueError: not JSON, or not an object; the message names the file.
    """
    return read_json(path) if path.is_file() else {}
