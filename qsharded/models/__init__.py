"""The models this project trains: one decoder, its configuration and its cache."""

from qsharded.models.cache import KVCache
from qsharded.models.config import ModelConfig
from qsharded.models.decoder import CausalLM

__all__ = ["CausalLM", "KVCache", "ModelConfig"]
