"""What :mod:`benchmarks.data` compares with: the same template and tokenizer on all cores by a plain pool.

It is what a script of some ten lines does: Jinja's sandbox as transformers sets it up, without our limits, and the
tokenizer's own `encode_batch`. It writes nothing, and finds no turns.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

_template: Template
_variables: dict[str, Any]
_tokenizer: tokenizers.Tokenizer


def plain_pool(model: Path, paths: Sequence[Path], most: int) -> tuple[float, int, int]:
    """(seconds, rows, tokens) of up to ``most`` rows of files, put through template and tokenizer."""
    start = time.monotonic()
    with multiprocessing.get_context("fork").Pool(initializer=_begin, initargs=(model,)) as pool:
        lines = islice(chain.from_iterable(path.open() for path in paths), most)
        chunks = iter(lambda: list(islice(lines, 500)), [])
        lengths = [len(ids) for chunk in pool.imap(_work, chunks) for ids in chunk]
    return time.monotonic() - start, len(lengths), sum(lengths)


def _begin(model: Path) -> None:
    global _template, _variables, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _variables = json.loads((model / "tokenizer_config.json").read_bytes())
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    _template = environment.from_string(_variables.pop("chat_template"))
    _tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))


def _work(lines: list[str]) -> list[list[int]]:
    texts = [
        _template.render(**_variables, messages=json.loads(line)["messages"], tools=None, add_generation_prompt=False)
        for line in lines
    ]
    return [one.ids for one in _tokenizer.encode_batch(texts, add_special_tokens=False)]
