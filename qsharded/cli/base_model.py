"""What belongs to an adapter folder that a command is given: its base model, its LoRAConfig, and its tokenizer."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qsharded.checkpoint.adapter import CARD_FILE, CONFIG_FILE, SCHEMA, read_lora_config
from qsharded.checkpoint.base_identity import BaseIdentity, CannotTell, base_of_adapter
from qsharded.checkpoint.initial_adapter import INITIAL_FILE, initial_of
from qsharded.checkpoint.source import DESCRIBING, download, is_hub_id
from qsharded.cli.command import DTYPES
from qsharded.config import TrainConfig, builtin_overrides
from qsharded.data import Tokenizer
from qsharded.data.template_options import TemplateOptions
from qsharded.distributed.agreement import found_by_main
from qsharded.distributed.world import World
from qsharded.lora.config import LoRAConfig
from qsharded.utils.untrusted_json import check, read_json

_OF_ADAPTER = [*DESCRIBING, "adapter_model.*", INITIAL_FILE, CARD_FILE]  # the tokenizer that it was trained with too

logger = logging.getLogger(__name__)


def find_adapter(path: str) -> Path:
    """The folder of an adapter: a local one, or a Hub repository's snapshot, downloaded if need be.

    Raises:
        ValueError: there is none, or the Hub refuses; a run's folder is told from the adapter inside it.
    """
    folder = Path(path)
    if not folder.exists() and is_hub_id(path):
        folder = download(path, None, _OF_ADAPTER)
    if (folder / CONFIG_FILE).is_file():
        return folder
    inside = folder / "adapter"
    hint = f"; did you mean {inside}?" if (inside / CONFIG_FILE).is_file() else ""
    raise ValueError(f"--adapter {path} is no adapter folder, it has no {CONFIG_FILE}{hint}")


def lora_config(config: TrainConfig, adapter: Path | None) -> LoRAConfig:
    """What the options, or an adapter to go on with, say of the adapters."""
    dtype = DTYPES[config.lora_dtype]
    if adapter:
        return read_lora_config(adapter, dtype)
    return LoRAConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        target_parameters=config.lora_target_parameters,
        use_rslora=config.use_rslora,
        rank_pattern=config.lora_rank_pattern,
        alpha_pattern=config.lora_alpha_pattern,
        modules_to_save=config.lora_modules_to_save,
        dtype=dtype,
    )


def base_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """``--model`` where it is not given: what the adapter was trained on. For ``parse``'s ``fill``.

    Raises:
        ValueError: no adapter where one is said to be, or one that does not name its base.
    """
    if "model" in given or given.get("adapter") is None:
        return {}
    folder = find_adapter(given["adapter"])
    model, revision = _base_of(folder)
    if not model:
        raise ValueError(f"{folder / CONFIG_FILE} names no base model: give --model")
    return {"model": model, "revision": revision}


def base_or_builtin_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, and without an adapter the built-in model."""
    if "model" in given or given.get("adapter") is not None:
        return base_model(given)
    return {"model": builtin_overrides(given)["model"]}


@contextmanager
def mismatch_explained(model: str, adapter: Path | None) -> Iterator[None]:
    """Add to a ValueError that the adapter was made for another model, where it says so."""
    try:
        yield
    except ValueError as error:
        base = _base_of(adapter)[0] if adapter else None
        if not base or base == model:
            raise
        raise ValueError(f"{error}\n(the adapter was trained on {base}, --model is {model})") from error


def base_note(
    adapter: Path,
    model: str,
    checkpoint: Path,
    *,
    allow_other: bool,
    base: BaseIdentity | None = None,
    any_rounding: bool = False,
) -> str | None:
    """A line to show where an adapter's base could not be told to be ``model``, which lies in ``checkpoint``.

    Args:
        allow_other: take another base, and say so.
        base: that of ``checkpoint``, where it is known already.
        any_rounding: take an adapter that makes up for the rounding of other weights than those, from the same 16 bits.

    Raises:
        ValueError: the adapter was trained on another base; what differs is said.
    """
    recorded = base_of_adapter(adapter)
    if recorded is None:
        return f"note: {adapter} does not record the weights it was trained on, so they were not compared with {model}"
    try:
        now = base or BaseIdentity.of(checkpoint)
        different = recorded.difference(now, checkpoint)
    except CannotTell as why:
        return f"note: whether {adapter} was trained on {model} could not be checked: {why}"
    if different is None and not any_rounding and initial_of(adapter) and recorded.rounding != now.rounding:
        different = (
            f"the adapter began with what the rounding of its base ({recorded.rounding}) left out, and this base is "
            f"rounded otherwise ({now.rounding})"
        )
    if different is None:
        return None
    other = f"{adapter} was trained on another base model than --model {model}: {different}"
    if not allow_other:
        raise ValueError(f"{other}. Give the model it was trained on{_named(adapter, model)}, or --allow-other-base")
    return f"note: {other}; taken all the same, as --allow-other-base says"


def log_base_note(
    world: World, adapter: Path, model: str, checkpoint: Path, *, allow_other: bool, any_rounding: bool = False
) -> None:
    """The same for a command that logs its lines. Every rank calls this; the main rank reads."""
    look = partial(base_note, adapter, model, checkpoint, allow_other=allow_other, any_rounding=any_rounding)
    note = found_by_main(world, look)
    if note and world.is_main:
        logger.info(note)


def _named(adapter: Path, model: str) -> str:
    base = _base_of(adapter)[0]
    return f" ({CONFIG_FILE} names {base})" if base and base != model else ""


def _base_of(adapter: Path) -> tuple[str | None, str | None]:
    read = read_json(adapter / CONFIG_FILE)
    check(read, SCHEMA, str(adapter / CONFIG_FILE))
    return read.get("base_model_name_or_path"), read.get("revision")


def tokenizer_folder(model: Path, adapter: Path | None) -> Path:
    """The adapter's folder if it has a tokenizer, as that is what it was trained with; else the model's."""
    return adapter if adapter and (adapter / "tokenizer.json").is_file() else model


def trained_tokenizer(model: Path, adapter: Path | None, given: TemplateOptions | None = None) -> Tokenizer:
    """That tokenizer, with the chat template as it was when the adapter was trained, but for what is ``given``.

    Raises:
        ValueError: its files, or the chat template, cannot be read.
    """
    kept = TemplateOptions.kept_in(adapter) if adapter else TemplateOptions()
    return Tokenizer.from_folder(tokenizer_folder(model, adapter), (given or TemplateOptions()).over(kept))
