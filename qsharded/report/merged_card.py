"""``README.md`` of a merged model: its model card. What the adapter's own card says of its training is taken over."""

import re
from dataclasses import dataclass
from typing import Any

from qsharded.report.markdown import code, front_matter, plain, section
from qsharded.report.shareable import hub_id, linked, name_of

_PLACE = "path/to/model"  # in commands, of a model that is not on the Hub
_TAKEN_OVER = ("Data", "Settings", "Loss", "Environment", "To repeat it")
_TAG = "qsharded"
_CHECKED = "Its logits against those of the base model with the adapter beside it: "


@dataclass(frozen=True)
class MergedModel:
    """What the card says of a model.

    Attributes:
        base: the base model, a folder or a Hub id.
        rounding: of the weights that the adapter was added to: "16bit", "nf4", "fp4".
        form: "safetensors", "gguf" or "compressed-tensors".
        gguf_type: of the matrices in GGUF.
        measured: how far it is from base and adapter, "" where that is not known.
        adapter_card: the text of the adapter's, "" where it has none.
        repository: its name on the Hub, if it goes there.
    """

    base: str
    rounding: str
    form: str
    gguf_type: str
    measured: str
    adapter_card: str
    repository: str | None = None


def merged_card(model: MergedModel) -> str:
    """Its text. No path of this machine is in it, but for what a foreign adapter's card says."""
    metadata, sections = _of_adapter(model.adapter_card)
    parts = [
        front_matter(_metadata(model, metadata)),
        f"\n# {plain(name_of(model.base))}, fine-tuned\n\n{_about(model)}\n",
        section("How to load it", _how_to_load(model)),
        section("Checked", _CHECKED + model.measured if model.measured else ""),
        *(section(title, sections[title]) for title in _TAKEN_OVER if title in sections),
    ]
    return "".join(parts)


def _metadata(model: MergedModel, of_adapter: dict[str, Any]) -> dict[str, Any]:
    base = hub_id(model.base)
    return {
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "library_name": None if model.form == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [name for name in of_adapter.get("datasets") or [] if isinstance(name, str)],
        "tags": ["lora", _TAG, *([model.form] if model.form != "safetensors" else [])],
    }


def _about(model: MergedModel) -> str:
    rounded = "" if model.rounding == "16bit" else f", whose weights were rounded to {model.rounding.upper()} first"
    same = "in the base model's precision"
    forms = {
        "safetensors": same,
        "gguf": f"as a GGUF file, {same if model.gguf_type == 'auto' else model.gguf_type.upper()}",
        "compressed-tensors": "with its linear layers in 4 bits (W4A16, rounded to nearest)",
    }
    return f"A LoRA adapter, merged with qsharded into {linked(model.base)}{rounded}, {forms[model.form]}."


def _how_to_load(model: MergedModel) -> str:
    place = model.repository or _PLACE
    if model.form == "gguf":
        where = f"-hf {place}" if model.repository else f"-m {place}/model.gguf"
        return (
            f"llama.cpp:\n\n{code(f'llama-cli {where}', 'bash')}\n{code(f'llama-server {where} --port 8080', 'bash')}"
        )
    loading = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto", device_map="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    )
    served = f"vLLM:\n\n{code(f'vllm serve {place}', 'bash')}\ntransformers:\n\n{code(loading, 'python')}"
    ours = f"\nqsharded:\n\n{code(f'qsharded chat --model {place}', 'bash')}" if model.form == "safetensors" else ""
    return served + ours


def _of_adapter(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(metadata, text of each section by its title) of a card that qsharded has written; of another one nothing."""
    from huggingface_hub import ModelCard  # here: what was trained elsewhere needs no Hub client

    if not text.startswith("---"):
        return {}, {}
    try:
        found = ModelCard(text)
        metadata: dict[str, Any] = found.data.to_dict()
    except Exception:  # somebody else's, and damaged
        return {}, {}
    if _TAG not in (metadata.get("tags") or []):
        return {}, {}
    parts = re.split(r"^## (.+)\n", found.text, flags=re.MULTILINE)
    return metadata, dict(zip(parts[1::2], parts[2::2], strict=True))
