"""A byte-level BPE tokenizer in GGUF: tokens, merges, special tokens and the name of its pre-tokenizer.

llama.cpp has each pre-tokenizer (what text is cut into before merges apply) as code of its own and knows it by a name.
A name that does not fit cuts numbers or spaces elsewhere, and the model then sees other tokens than it was trained on;
so a tokenizer whose cuts are not known here is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import tokenizers

from qsharded.data.tokenizer import Tokenizer
from qsharded.data.tokenizer_files import load_backend, read_settings, read_templates, special_variables

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The steps of tokenizer.json's pre_tokenizer -> llama.cpp's name
_NAMES = {
    (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False)): "llama-bpe",
    (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer of a checkpoint to an open ``gguf.GGUFWriter``.

    Args:
        vocab_size: rows of the embedding; those without a token get a name of their own.

    Raises:
        ValueError: the tokenizer is not byte-level BPE, or its pre-tokenizer is unknown.
    """
    settings = read_settings(folder)
    backend = load_backend(folder, settings)
    described = json.loads(backend.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(described))
    _add_tokens(writer, backend, vocab_size)
    writer.add_token_merges(_merges(described["model"]))
    _add_specials(writer, backend, special_variables(settings))
    writer.add_add_bos_token(Tokenizer.from_folder(folder).adds_bos)
    template = read_templates(folder, settings).get("default")
    if template is not None:
        writer.add_chat_template(template)


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a tokenizer that is not written, as :func:`pre_tokenizer_name` does."""
    pre_tokenizer_name(json.loads(load_backend(folder, read_settings(folder)).to_str()))


def pre_tokenizer_name(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises:
        ValueError: it has none that is known here.
    """
    model, normalizer = described["model"], described.get("normalizer")
    steps = _steps(described.get("pre_tokenizer") or {})
    byte_level = model["type"] == "BPE" and not model.get("byte_fallback") and ("ByteLevel" in dict(steps))
    if not byte_level or (normalizer or {"type": "NFC"}) != {"type": "NFC"}:
        raise ValueError(f"the tokenizer is {model['type']} after {normalizer}, not byte-level BPE: no GGUF is written")
    if not model["merges"]:
        return "gpt-2"  # every byte is a token, however the text is cut
    if steps not in _NAMES:
        raise ValueError(f"the pre-tokenizer {steps} is not known to be one of llama.cpp's: no GGUF is written")
    return _NAMES[steps]


def _steps(step: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    kind = step.get("type")
    if kind == "Sequence":
        return tuple(part for inner in step["pretokenizers"] for part in _steps(inner))
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return ((kind, step["pattern"].get("Regex")),)
    if kind == "Digits":
        return ((kind, step["individual_digits"]),)
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return ((kind, step["use_regex"]),)
    return ((str(kind), None),)


def _merges(model: Mapping[str, Any]) -> list[str]:
    """At least one: llama.cpp does not load a vocabulary without. Text has no symbol of two letters to begin with."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return merges or ["<none> <none>"]


def _add_tokens(writer: Any, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
    by_id = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    types = gguf.TokenType
    kinds = {number: types.CONTROL if token.special else types.USER_DEFINED for number, token in added.items()}
    normal = dict.fromkeys(by_id, types.NORMAL) | kinds
    writer.add_token_types([normal.get(number, types.UNUSED) for number in range(vocab_size)])


def _add_specials(writer: Any, backend: tokenizers.Tokenizer, specials: Mapping[str, str]) -> None:
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for kind, add in adders.items():
        number = backend.token_to_id(specials.get(f"{kind}_token", ""))
        if number is not None:
            add(number)
