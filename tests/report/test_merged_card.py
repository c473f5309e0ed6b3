"""A merged model's README.md: what the Hub reads, how it is loaded, and what it takes from the adapter's card."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qsharded.report.merged_card import MergedModel, merged_card
from qsharded.report.model_card import adapter_card
from tests.report.test_model_card import ADAPTER, BASE
from tests.report.test_pages import RECORD, written

GIVEN = {
    "base": BASE, "rounding": "16bit", "form": "safetensors", "gguf_type": "auto", "measured": "", "adapter_card": "",
}  # fmt: skip


def card(**given: Any) -> ModelCard:
    return ModelCard(merged_card(MergedModel(**GIVEN | given)))


def section_of(text: str, title: str) -> str:
    found = re.search(rf"\n## {title}\n.*?(?=\n## |\Z)", text, re.DOTALL)
    assert found, title
    return found[0].strip()


def test_it_takes_data_settings_and_loss_from_the_adapters_card(tmp_path: Path) -> None:
    data = [RECORD["data"][0] | {"name": "org/chats"}]
    run = written(tmp_path / "out", [2.0, 1.5, 1.4375], RECORD | {"data": data}, model=BASE)
    of_adapter = adapter_card(run, ADAPTER, 3)
    found = card(adapter_card=of_adapter, measured="mean KL divergence 1e-05 nats")
    assert found.data.datasets == ["org/chats"]
    assert found.data.base_model == BASE
    assert found.data.to_dict()["base_model_relation"] == "finetune"
    for title in ("Data", "Settings", "Loss", "To repeat it"):
        assert section_of(str(found), title) == section_of(of_adapter, title), title
    assert "PeftModel" not in str(found)
    assert "with the adapter beside it: mean KL divergence 1e-05 nats" in str(found)


@pytest.mark.parametrize("front", ["", "# Mine\n\n", "---\ntags: [x]\n---\n", "---\n: [\n---\n"])
def test_a_foreign_adapters_card_is_left_alone(front: str) -> None:
    foreign = f"{front}## Data\n\n/home/me\n"
    assert "/home/me" not in str(card(adapter_card=foreign))
    assert card(adapter_card=foreign).data.base_model == BASE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ["vllm serve path/to/model", 'from_pretrained("path/to/model"', "qsharded chat --model path/to/model"]),
        ({"repository": "me/x"}, ["vllm serve me/x", 'from_pretrained("me/x"', "qsharded chat --model me/x"]),
        ({"form": "gguf", "gguf_type": "q8_0"}, ["llama-server -m path/to/model/model.gguf --port 8080", "Q8_0"]),
        ({"form": "gguf", "repository": "me/x"}, ["llama-cli -hf me/x", "the base model's precision"]),
        ({"form": "compressed-tensors", "repository": "me/x"}, ["vllm serve me/x", "W4A16"]),
        ({"rounding": "nf4"}, ["whose weights were rounded to NF4 first"]),
    ],
)
def test_it_says_how_it_was_made_and_is_loaded(given: dict[str, Any], said: list[str]) -> None:
    found = card(**given)
    for words in said:
        assert words in str(found)
    assert found.data.library_name == (None if given.get("form") == "gguf" else "transformers")
    assert ("gguf" in found.data.tags) == (given.get("form") == "gguf")
    assert ("qsharded chat" in str(found)) == (given.get("form") is None)  # it reads no GGUF and no compressed-tensors


def test_a_base_of_this_machine_is_named_without_its_path(tmp_path: Path) -> None:
    found = card(base=str(tmp_path / "mine"))
    assert str(tmp_path) not in str(found)
    assert "# mine, fine-tuned" in str(found)
    assert "base_model" not in found.data.to_dict()
