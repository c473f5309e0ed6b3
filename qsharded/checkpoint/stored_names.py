"""What a checkpoint's tensors are called in the model: by the rules of transformers, for models that run its code."""

from dataclasses import replace

from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.models.choice import AnyConfig
from qsharded.models.config import ModelConfig


def as_called(source: SafetensorsFolder, config: AnyConfig) -> SafetensorsFolder:
    """``source`` with the names that the model of ``config`` has, and without the tensors that its class ignores.

    Raises:
        ValueError: a tensor that transformers makes another of than a renamed one.
    """
    if isinstance(config, ModelConfig):
        return source
    from qsharded.models.transformers_code.stored_names import names_in_model  # here: transformers is optional

    names = names_in_model(config, source.names_in_files())
    return replace(source, called=names.called, stacked=names.stacked, ignored=frozenset(names.ignored))
