"""Whether a message asks to be trained on, in the spellings of the tools that datasets were made for."""

from typing import Any

_PARTS = ("train_detail", "training_detail")
# OpenAI's; axolotl's, with the name that its documentation gives the field; AgentInstruct's.
WEIGHT_KEYS = ("weight", "train", "training", "loss", *_PARTS)


def asks_for_training(said: dict[str, Any], where: str) -> bool | None:
    """Whether the fields ``said``, by :data:`WEIGHT_KEYS`, are 1 or true; None if there are none.

    Raises:
        ValueError: a value that is none of true, false, 1 and 0; fields that contradict each other; parts of a message.
    """
    for key, value in said.items():
        if key in _PARTS:
            raise ValueError(f"{where}: {key} trains parts of a message, which is not supported; remove it")
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"{where}: {key} must be 0, 1, true or false, got {value!r}: a message is trained on or it is not"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{where}: " + " and ".join(f"{k} {v!r}" for k, v in said.items()) + " contradict each other")
    return all(said.values()) if said else None
