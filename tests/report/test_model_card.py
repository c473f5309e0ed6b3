"""An adapter's README.md: what the Hub reads of it, how it says to load it, and what must not be in it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qsharded.report.markdown import code, front_matter, table
from qsharded.report.model_card import adapter_card
from qsharded.report.run_files import Run
from qsharded.report.shareable import hub_id
from tests.report.test_pages import RECORD, written

ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "bias": "none", "revision": None}
BASE = "meta-llama/Llama-3.1-8B"


def card(run: Run, step: int = 3, **adapter: Any) -> ModelCard:
    """As the Hub's own client reads it."""
    return ModelCard(adapter_card(run, ADAPTER | adapter, step))


def test_the_hub_is_told_base_library_and_data(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    names = [str(rows), "org/chats:en", "org/chats:de", f"{tmp_path}/hub/datasets--org--more/snapshots/0f/a.jsonl"]
    data = [RECORD["data"][0] | {"name": name} for name in names]
    data.append(RECORD["data"][0] | {"name": "org/held", "use": "evaluation"})
    said = card(written(tmp_path / "out", [2.0, 1.5, 1.4375], RECORD | {"data": data}, model=BASE)).data
    assert said.base_model == BASE
    assert (said.library_name, said.pipeline_tag) == ("peft", "text-generation")
    assert said.datasets == ["org/chats", "org/more"]
    assert "lora" in said.tags


def test_it_says_what_was_trained_how_and_how_far(tmp_path: Path) -> None:
    text = str(card(written(tmp_path / "out", [2.0, 1.5, 1.4375], RECORD, model=BASE), 2))
    for said in (
        "trained for 2 of 3 steps",
        f"[{BASE}](https://huggingface.co/{BASE}) (commit beef)",
        "rank 16, alpha 32",
        "| rows.jsonl |  | training | 12 | 3,456 | 2,345 |",
        "| fingerprint of the rows | aa55 |",
        "| layers | q\\_proj, v\\_proj |",
        "| rows of a step | 8 |",
        "`█▂▁`",
        "| 1 | 2 |\n| 2 | 1.5 |\n| 3 | 1.438 |",
        "2 x NVIDIA H200 (140 GiB)",
        f"qsharded train --model {BASE} --dataset d --ranks 2",
    ):
        assert said in text, said


def test_a_base_of_this_machine_is_named_without_its_path_and_not_told_to_the_hub(tmp_path: Path) -> None:
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    record = RECORD | {"model": RECORD["model"] | {"name": str(model)}}
    found = card(written(tmp_path / "out", [1.0], record, model=str(model)))
    assert "base_model" not in found.data.to_dict()
    assert "LoRA adapter for mine" in str(found)
    assert str(tmp_path) not in str(found)


def test_python_blocks_are_python_and_load_from_the_hub(tmp_path: Path) -> None:
    run = written(tmp_path / "out", [1.0], RECORD, model=BASE)
    text = adapter_card(run, ADAPTER | {"revision": "v2"}, 1, "me/tuned")
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(block, "card", "exec")
    assert f'from_pretrained("{BASE}", revision="v2", ' in block
    assert 'PeftModel.from_pretrained(base, "me/tuned")' in block
    assert f"qsharded chat --model {BASE} --adapter me/tuned" in text


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (16, 16), (17, 32), (64, 64)])
def test_vllm_is_given_room_for_the_rank(tmp_path: Path, rank: int, room: int) -> None:
    text = str(card(written(tmp_path / "out", [1.0], RECORD, model=BASE), r=rank))
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank {room} --lora-modules tuned=path/to/adapter" in text


def test_what_vllm_does_not_serve_is_to_be_merged(tmp_path: Path) -> None:
    text = str(card(written(tmp_path / "out", [1.0], RECORD, model=BASE), modules_to_save=["lm_head"]))
    assert "vllm serve" not in text
    assert "vLLM loads no whole modules" in text


def test_a_run_that_logged_nothing_yet_has_a_card(tmp_path: Path) -> None:
    text = str(card(written(tmp_path / "out", [None, None]), 0))
    assert "\n## Settings\n" in text
    assert "█" not in str(card(written(tmp_path / "few", [2.0, 1.0])))
    assert "\n## Loss\n" not in text


NASTY = ['a: "b"', "- x", "# no", "null", "1e3", "yes", "ü\n---\n"]


def test_metadata_is_yaml_whatever_is_in_it() -> None:
    text = front_matter({"name": NASTY[0], "tags": NASTY, "none": None, "empty": []})
    assert text.startswith("---\n")
    assert text.endswith("\n---\n")
    assert yaml.safe_load(text.removesuffix("---\n")) == {"name": NASTY[0], "tags": NASTY}


def test_a_cell_stays_a_cell_and_code_stays_code() -> None:
    assert table(["a"], [["x | y\n<b> [l](http://z)"]]).splitlines()[2] == "| x \\| y \\<b\\> \\[l\\](http://z) |"
    assert code("a\n```\nb", "bash").startswith("````bash\na\n```\nb\n````")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", "org/name"),
        ("org/name/folder", "org/name"),
        ("org/name:en", "org/name"),
        ("data/rows.jsonl", None),
        ("/data/models/llama", None),
        ("gpt2", None),
        ("/x/qsharded/builtin/model", None),
        ("/root/.cache/huggingface/hub/models--org--name/snapshots/0f1e", "org/name"),
    ],
)
def test_what_is_on_the_hub_is_told_by_its_id(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected
