"""The list of families for README and docs/models.md, made from the registry that the tests go through."""

import re

from qsharded.fused.layer import beyond_fused
from qsharded.models import ModelConfig
from qsharded.models.config_keys import SHAPE_KEYS
from qsharded.models.families import FAMILIES, WRAPPERS

_SHAPE = dict.fromkeys(SHAPE_KEYS, 64) | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
_IN_README = re.compile(r"(<!-- families, by tools/families.py -->).*?(<!-- end -->)", re.DOTALL)
_HEAD = """# Models

Decoders of these families are computed natively, from safetensors in a folder or on the Hub, in the spellings of
config.json that transformers 4 and 5 write; a key of config.json that is not known is refused by name. What is no such
family runs [through transformers' code](#through-transformers-code). Each family and spelling is held to transformers
and PEFT in `tests/models/test_families.py`, and sharded over two ranks in `tests/distributed/test_families.py`: logits,
loss and the adapters' gradients within 1e-5 of each tensor's largest value in fp32, on the same packed weights.

"""
_TAIL = """
A layer that is fused is one autograd node in training ([architecture.md](architecture.md)), or, up to its mixture of
experts, a node before it; the others run as they are written, with PyTorch's autograd and the same checkpointing modes.
Ministral 3 is fused in rows up to its original context.

Of a multimodal model the text part is trained: a line says so, rows that hold images are refused, and `merge` carries
the other parts' tensors through unchanged. PEFT reads the adapter on the whole model.

Qwen3.5's gated delta-net layers run through flash-linear-attention's kernel where that is installed (on GPUs, in
16 bits), else in plain PyTorch. Layers that predict further tokens (`mtp.*`, or behind the last as in DeepSeek V3) are
not trained; `merge` carries them through.

Mixtures of experts, and latent attention: [mixtures-of-experts.md](mixtures-of-experts.md).

Dropout that a config.json asks for (Seed-OSS's) is not applied; a line says so.
"""


def page() -> str:
    """docs/models.md."""
    head = "| family | `model_type` | beyond Llama | layers |\n|---|---|---|---|\n"
    return _HEAD + head + "".join(map(_row, FAMILIES)) + _wrappers() + _TAIL


def _row(model_type: str) -> str:
    family = FAMILIES[model_type]
    config = ModelConfig.from_hf({**_SHAPE, **family.published, "model_type": model_type})
    fused = "fused" if config.mixture is None else "fused up to the mixture"
    layers = fused if (reason := beyond_fused(config)) is None else f"as written: {reason}"
    return f"| {family.title} | `{model_type}` | {family.beyond} | {layers} |\n"


def _wrappers() -> str:
    rows = (f"| {wrapper.title} | `{name}` | its `text_config` |  |\n" for name, wrapper in WRAPPERS.items())
    return "".join(rows)


def in_readme(readme: str) -> str:
    """README with the families' names put in."""
    titles = ", ".join(family.title for family in FAMILIES.values())
    return _IN_README.sub(rf"\g<1>{titles}\g<2>", readme)
