"""Which adapters vLLM serves, by the rules of its own loader (vllm/lora/peft_helper.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from qsharded.integrations.vllm import check_adapter
from tests.adapters import write_adapter
from tests.checkpoints import write_checkpoint

GOOD = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none", "modules_to_save": None}


def write(folder: Path, **config: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(GOOD | config))
    return folder


def test_an_adapter_that_it_serves(tmp_path: Path) -> None:
    check_adapter(write(tmp_path))
    check_adapter(write(tmp_path, use_rslora=True, r=64), max_lora_rank=64)
    (tmp_path / "model").mkdir()
    check_adapter(write_adapter(tmp_path / "adapter", write_checkpoint(tmp_path / "model")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": None}, "r is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] \(vLLM loads no whole modules\)"),
        ({"use_dora": True}, "vLLM has no DoRA"),
        ({"alpha_pattern": {"q_proj": 8}}, "scales every layer by the one lora_alpha"),
        ({"rank_pattern": {"q_proj": 8}}, "scales every layer by the one r"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"r": 32}, "r = 32 is over max_lora_rank = 16"),
    ],
)
def test_what_it_does_not_serve_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_adapter(write(tmp_path, **config))
