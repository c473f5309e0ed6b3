"""The families of models that are computed natively: how each one's config.json becomes a ModelConfig.

A family is an entry of ``FAMILIES``; its mathematics is in the decoder. The defaults are those of its configuration
class in transformers, for the keys that a config.json leaves out. The list in README is made from here, and the tests
go through it (tests/models/variants.py).
"""

from qsharded.models.families import deepseek, exaone, gemma, glm, gpt_oss, hunyuan, llama, mistral, olmo, phi, qwen
from qsharded.models.families.family import Family
from qsharded.models.families.wrappers import WRAPPERS

FAMILIES: dict[str, Family] = {
    model_type: family
    for makers in (llama, mistral, qwen, gemma, phi, olmo, glm, deepseek, exaone, hunyuan, gpt_oss)
    for model_type, family in makers.FAMILIES.items()
}

__all__ = ["FAMILIES", "WRAPPERS", "Family"]
