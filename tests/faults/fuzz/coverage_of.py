"""Which lines of a reader's functions some cases have run, by the coverage package (the extra ``dev``)."""

import ast
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The files that read what each parser is given, under qsharded/.
READERS = {
    "config": (
        *("models/config.py", "models/config_schema.py", "models/config_keys.py", "models/config_spellings.py"),
        *("models/families/reading.py", "models/layer_patterns.py", "models/rope.py"),
    ),
    "index": ("checkpoint/source.py",),
    "tokenizer settings": ("data/tokenizer_files.py", "data/tokenizer.py"),
    "tokenizer": ("data/tokenizer.py", "data/tokenizer_files.py"),
    "adapter config": ("lora/config.py",),
    "quant state": ("checkpoint/packed_format.py",),
    "quantization config": ("checkpoint/packed_format.py",),
    "safetensors header": ("checkpoint/safetensors_header.py",),
    "rows": ("data/records.py",),
}
_SCHEMA = "utils/untrusted_json.py"  # through which all but rows come


def covered(name: str, run: Callable[[], object]) -> dict[str, Any]:
    """What ``run`` covers of the readers of the parser called ``name``: lines in functions, and which it has not."""
    from coverage import Coverage  # here: only this takes it

    root = _package()
    files = {file: root / file for file in (*READERS[name], _SCHEMA)}
    measured = Coverage(data_file=None, include=[str(path) for path in files.values()])
    measured.start()
    try:
        run()
    finally:
        measured.stop()
    return {file: _of_file(measured, path) for file, path in files.items()}


def _package() -> Path:
    spec = find_spec("qsharded")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def _of_file(measured: Any, path: Path) -> dict[str, Any]:
    inside = set(_lines_in_functions(ast.parse(path.read_text())))
    _, statements, _, missing, _ = measured.analysis2(str(path))
    lines, missed = inside & set(statements), sorted(inside & set(missing))
    return {"lines": len(lines), "covered": round(1 - len(missed) / max(1, len(lines)), 3), "missed": missed}


def _lines_in_functions(tree: ast.Module) -> Iterator[int]:
    """The rest runs when the module is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                yield from range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
