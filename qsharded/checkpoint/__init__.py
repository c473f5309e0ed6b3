"""Reading models, and writing and reading what training makes of them."""

from qsharded.checkpoint.load import load_model

__all__ = ["load_model"]
