"""What config.json files say in other ways than transformers writes it, and keys that the user says to pass over."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger(__name__)

_ARCHITECTURES = {"LLaMAForCausalLM": "LlamaForCausalLM", "LLaMaForCausalLM": "LlamaForCausalLM"}
# What transformers' class does not read, by family: the kinds of layers, and windows that are off.
_UNREAD = {
    "llama": ("use_sliding_window", "max_window_layers", "sliding_window"),
    "mistral": ("use_sliding_window", "max_window_layers"),
}
_OF_ROUTED = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
# What transformers 5 writes for a key of the models' own config.json, by family.
_RENAMED = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_next": {"num_local_experts": "num_experts"},
    "qwen3_5_moe_text": {"num_local_experts": "num_experts"},
    "glm4_moe": _OF_ROUTED,
    "glm4_moe_lite": _OF_ROUTED,
    "deepseek_v3": _OF_ROUTED,
    "deepseek_v2": {"num_experts": "n_routed_experts"},
}


class _Ignored:
    """Keys to pass over, and which of them were met."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = frozenset(keys)
        self.met: set[str] = set()


_ignored: ContextVar[_Ignored | None] = ContextVar("ignored keys of config.json", default=None)


def respelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as transformers understands it: old names of classes, and keys that its class does not read."""
    said = dict(config)
    if said.get("architectures"):
        said["architectures"] = [_ARCHITECTURES.get(name, name) for name in said["architectures"]]
    for new, old in _RENAMED.get(said.get("model_type", ""), {}).items():
        if new in said:
            said[old] = said.pop(new)
    unread = _UNREAD.get(said.get("model_type", ""), ())
    if said.get("use_sliding_window") is False:
        said = {key: value for key, value in said.items() if key not in unread}
    if unread and set(said.get("layer_types") or ()) == {"full_attention"} and not said.get("sliding_window"):
        # beside a window transformers' class for Mistral passes it over, and the one that AutoModel takes does not
        del said["layer_types"]
    return said


@contextmanager
def ignoring(keys: Iterable[str]) -> Iterator[None]:
    """Have every config.json that is read inside passed over for these keys, if they are not known here; it is logged.

    A key that this decoder reads cannot be ignored: it would then compute something else than the key says.
    """
    token = _ignored.set(_Ignored(keys))
    try:
        yield
    finally:
        _ignored.reset(token)


def is_ignored(key: str, value: Any) -> bool:
    """Whether the user says to pass over this key; the first time it is logged."""
    ignored = _ignored.get()
    if ignored is None or key not in ignored.keys:
        return False
    if key not in ignored.met:
        logger.warning("note: config key %r (%r) is passed over, as --ignore-config-key says", key, value)
    ignored.met.add(key)
    return True
