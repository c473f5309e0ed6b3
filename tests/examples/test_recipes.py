"""Every recipe in examples/ is read, and the plan that its comment asks for says that it fits."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from qsharded import train
from qsharded.config import parse_train
from tests.checkpoints import LLAMA

FOLDER = Path(__file__).parents[2] / "examples"
RECIPES = sorted(FOLDER.glob("*.toml"))
_LLAMA = LLAMA | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The published config.json of each model, in what decides its memory.
SHAPES = {
    "meta-llama/Llama-3.1-8B": _LLAMA | dict(zip(_SIZES, (4096, 14336, 32, 32), strict=True)),
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA | dict(zip(_SIZES, (4096, 14336, 32, 32), strict=True)),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA | dict(zip(_SIZES, (8192, 28672, 80, 64), strict=True)),
    "meta-llama/Llama-3.1-405B-Instruct": _LLAMA | dict(zip(_SIZES, (16384, 53248, 126, 128), strict=True)),
    "Qwen/Qwen3-8B": _LLAMA
    | dict(zip(_SIZES, (4096, 12288, 36, 32), strict=True))
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "vocab_size": 151936},
}


def command(recipe: Path, name: str) -> list[str]:
    """The words behind ``qsharded NAME`` in its comment."""
    [line] = re.findall(rf"^#   .*\bqsharded {name} (.*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line)


def test_there_is_one_for_what_people_ask_for() -> None:
    names = " ".join(path.stem for path in RECIPES)
    for asked in ("8b-one-24gb", "70b-two-24gb", "70b-two-80gb", "405b-two-141gb", "slurm", "pretraining", "tools"):
        assert asked in names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_its_plan_fits(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER.parent)
    config = parse_train(command(recipe, "train"))
    assert command(recipe, "train") == ["--config", f"examples/{recipe.name}"]
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[config.model]))
    words = ["--dry-run", *command(recipe, "plan"), "--model", str(tmp_path)]
    planned = parse_train(words)
    assert dataclasses.replace(planned, model=config.model, dry_run=False, gpus=None, gpu_memory_gib=None) == config
    with pytest.raises(SystemExit) as leave:
        train.main(words)
    text = capsys.readouterr().out
    assert leave.value.code == 0, text
    assert "verdict: fits" in text
