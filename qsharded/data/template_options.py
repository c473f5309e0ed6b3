"""What a user sets of the chat template, and the file that keeps it with what was trained so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from qsharded.utils.dates import DATE_IN_WORDS, is_date
from qsharded.utils.untrusted_json import ANY, NULL, Kind, check, map_of, read_json

TEMPLATE = "chat_template.jinja"
# Beside a tokenizer's files. transformers knows no such file: what it holds is given to its apply_chat_template.
OPTIONS_FILE = "chat_template_options.json"
_SCHEMA = {"variables": map_of(ANY, 100), "date": Kind(DATE_IN_WORDS, is_date) | NULL}


@dataclass(frozen=True)
class TemplateOptions:
    """Nothing but what is otherwise than the tokenizer's folder has it.

    Attributes:
        file: a Jinja program in the place of all of the folder's.
        variables: beside the messages, as ``enable_thinking``.
        today: the date that programs are told which ask for it; None: today's.
    """

    file: Path | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    today: date | None = None

    def sources(self) -> dict[str, str]:
        """Name -> program of those in the folder's place, none if there is no such.

        Raises:
            ValueError: the file cannot be read.
        """
        if self.file is None:
            return {}
        try:
            return {"default": self.file.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the chat template {self.file} cannot be read: {error}") from None

    @classmethod
    def given(cls, file: str | None, variables: Mapping[str, Any], today: str | None) -> "TemplateOptions":
        """As options have them: a path, and a date such as 2025-01-31."""
        return cls(Path(file) if file else None, variables, date.fromisoformat(today) if today else None)

    @classmethod
    def kept_in(cls, folder: Path) -> "TemplateOptions":
        """What :meth:`files` says of them in the folder of a tokenizer or of an adapter; nothing where it has none.
        Beside a tokenizer the Jinja program is the tokenizer's own.

        Raises:
            ValueError: the file is malformed.
        """
        path, file = folder / OPTIONS_FILE, None
        if not (folder / "tokenizer.json").is_file() and (folder / TEMPLATE).is_file():
            file = folder / TEMPLATE
        if not path.is_file():
            return cls(file)
        read = read_json(path)
        check(read, _SCHEMA, str(path))
        today = read.get("date")
        return cls(file, read.get("variables", {}), date.fromisoformat(today) if today else None)

    def over(self, kept: "TemplateOptions") -> "TemplateOptions":
        """These, and of ``kept`` what they leave open."""
        return TemplateOptions(self.file or kept.file, {**kept.variables, **self.variables}, self.today or kept.today)

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that say all of this, for the folder of an adapter.

        Raises:
            ValueError: as :meth:`sources`.
        """
        files = {} if self.file is None else {TEMPLATE: self.sources()["default"].encode()}
        if self.variables or self.today is not None:
            today = None if self.today is None else self.today.isoformat()
            files[OPTIONS_FILE] = json.dumps({"variables": dict(self.variables), "date": today}, indent=1).encode()
        return files

    def __str__(self) -> str:
        """As the command line has them, but for the file."""
        said = [f"{name}={json.dumps(value)}" for name, value in sorted(self.variables.items())]
        return ", ".join(said + [f"date {self.today}"] * (self.today is not None)) or "none"
