"""What a user sets of the chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any


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
