"""vLLM: whether it can serve an adapter. vLLM itself is not needed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsharded.checkpoint.adapter import CONFIG_FILE
from qsharded.utils.untrusted_json import read_json

_REQUIRED = ("r", "lora_alpha", "target_modules")
# What changes the adapter's forward, and why vLLM does not follow.
_UNSUPPORTED = {
    "modules_to_save": "vLLM loads no whole modules",
    "use_dora": "vLLM has no DoRA",
    "rank_pattern": "vLLM scales every layer by the one r",
    "alpha_pattern": "vLLM scales every layer by the one lora_alpha",
}


def check_adapter(folder: Path | str, max_lora_rank: int = 16) -> None:
    """Make sure that vLLM serves the adapter in ``folder`` as it was trained.

    Args:
        max_lora_rank: what vLLM is started with (``--max-lora-rank``; 16 is its default).

    Raises:
        ValueError: it does not; every reason is named.
    """
    path = Path(folder) / CONFIG_FILE
    reasons = list(unsupported(read_json(path), max_lora_rank))
    if reasons:
        raise ValueError(
            f"{path}: vLLM cannot serve this adapter: {'; '.join(reasons)}. Merge it instead: python -m qsharded.merge"
        )


def unsupported(config: Mapping[str, Any], max_lora_rank: int) -> Iterator[str]:
    """Why vLLM does not serve the adapter of such an adapter_config.json; nothing where it does."""
    for key in _REQUIRED:
        if not config.get(key):
            yield f"{key} is missing"
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            yield f"{key} = {config[key]!r} ({why})"
    if config.get("bias", "none") != "none":
        yield f"bias = {config['bias']!r} (vLLM adds none)"
    r = config.get("r") or 0
    if r > max_lora_rank:
        yield f"r = {r} is over max_lora_rank = {max_lora_rank} (start vLLM with --max-lora-rank {r})"
