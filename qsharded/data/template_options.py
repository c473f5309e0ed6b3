"""What a user sets of the chat template, and the file that keeps it with what was trained so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from qsharded.utils.dates import DATE_IN_WORDS, is_date
from qsharded.utils.untrusted_json import ANY, NULL, Kind, check, map_of, read_json

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
        """Those of :data:`OPTIONS_FILE` in a tokenizer's folder; nothing where there is no such file.

        Raises:
            ValueError: the file is malformed.
        """
        path = folder / OPTIONS_FILE
        if not path.is_file():
            return cls()
        read = read_json(path)
        check(read, _SCHEMA, str(path))
        today = read.get("date")
        return cls(None, read.get("variables", {}), date.fromisoformat(today) if today else None)

    def over(self, kept: "TemplateOptions") -> "TemplateOptions":
        """These, and of ``kept`` what they leave open."""
        return TemplateOptions(self.file or kept.file, {**kept.variables, **self.variables}, self.today or kept.today)

    def to_json(self) -> bytes | None:
        """What :data:`OPTIONS_FILE` holds of them, None where that is nothing."""
        if not self.variables and self.today is None:
            return None
        today = None if self.today is None else self.today.isoformat()
        return json.dumps({"variables": dict(self.variables), "date": today}, indent=1).encode()

    def __str__(self) -> str:
        """As the command line has them, but for the file."""
        said = [f"{name}={json.dumps(value)}" for name, value in sorted(self.variables.items())]
        return ", ".join(said + [f"date {self.today}"] * (self.today is not None)) or "none"
