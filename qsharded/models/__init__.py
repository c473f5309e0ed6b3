"""The models this project trains: one decoder, its configuration and its cache."""

from qsharded.models.config import ModelConfig
from qsharded.models.decoder import CausalLM
from qsharded.models.kv_cache import KVCache

__all__ = ["CausalLM", "KVCache", "ModelConfig"]
