"""transformers' rules for a checkpoint's tensors: which are renamed, which are stacked, which are ignored."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qsharded.models.transformers_code.build import build
from qsharded.models.transformers_code.description import TransformersConfig


@dataclass
class StoredNames:
    """What becomes of the tensors in a checkpoint's files.

    Attributes:
        called: name in the files -> name in the model.
        stacked: name in the model -> for each row of that tensor, the tensors in the files that make it, in order.
        ignored: names that the model's class ignores.
    """

    called: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, list[list[str]]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)


def names_in_model(config: TransformersConfig, stored: Iterable[str]) -> StoredNames:
    """Of the tensors ``stored`` in files.

    Raises:
        ValueError: a tensor that is split, transposed, or changed otherwise on its way into the model.
    """
    with torch.device("meta"):
        hf = build(config, torch.float32)
    known = hf.state_dict()
    rules = get_model_conversion_mapping(hf)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names, parts = StoredNames(), dict[str, dict[str, list[str]]]()
    for name in sorted(stored, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, hf.base_model_prefix, known)
        if name in known:
            continue
        if pattern is not None:
            _refuse_other_operations(hf, _with(pattern, converters), name, new)
            parts.setdefault(new, {}).setdefault(pattern, []).append(name)
        elif new not in known and _is_ignored(hf, new):
            names.ignored.add(name)
        elif new != name:
            names.called[name] = new
    names.stacked = {new: _in_order(of_patterns, converters) for new, of_patterns in parts.items()}
    return names


def _with(pattern: str, converters: Iterable[WeightConverter]) -> WeightConverter:
    return next(converter for converter in converters if pattern in converter.source_patterns)


def _in_order(of_patterns: dict[str, list[str]], converters: Iterable[WeightConverter]) -> list[list[str]]:
    """For each expert its tensors, in the order in which the converter names them."""
    patterns = _with(next(iter(of_patterns)), converters).source_patterns
    return [list(names) for names in zip(*(of_patterns[p] for p in patterns if p in of_patterns), strict=True)]


def _refuse_other_operations(hf: Any, converter: WeightConverter, name: str, new: str) -> None:
    """All but the stacking of experts, each of one tensor or of several behind each other."""
    stack, *join = converter.operations
    stacks = type(stack) is MergeModulelist and stack.dim == 0
    joins = not join or (len(join) == 1 and type(join[0]) is Concatenate and join[0].dim == 1)
    if not (stacks and joins and len(converter.target_patterns) == 1):
        raise ValueError(_converted(hf, name, new))


def _converted(hf: Any, name: str, new: str) -> str:
    return (
        f"{type(hf).__name__}: {name} is stored in another layout than the model's {new}, which transformers changes "
        "on its way; that is not done here. Save the model with transformers in its own layout "
        "(save_pretrained(..., save_original_format=False)) and give that"
    )


def _is_ignored(hf: Any, name: str) -> bool:
    patterns = getattr(hf, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
