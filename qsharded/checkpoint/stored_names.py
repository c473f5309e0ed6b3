"""What a checkpoint's tensors are called in the model: for models that run transformers' code by its rules; for ours,
whose modules have the names of most checkpoints, where a family's are called otherwise."""

import re
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
        return _native(source, config)
    from qsharded.models.transformers_code.stored_names import names_in_model  # here: transformers is optional

    names = names_in_model(config, source.names_in_files())
    return replace(source, called=names.called, stacked=names.stacked, ignored=frozenset(names.ignored))


_PACKED = r"experts\.(?:gate|up|down)_proj\.\w+"  # as transformers saves ours
_MIXTRAL = re.compile(rf"(.*)\.block_sparse_moe\.(gate\.weight|experts\.\d+\.w[123]\.weight|{_PACKED})")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _native(source: SafetensorsFolder, config: ModelConfig) -> SafetensorsFolder:
    names = source.names_in_files()
    called = {name: _of_mixtral(name) for name in names if _MIXTRAL.fullmatch(name)}
    ignored = frozenset(name for name in names if _is_further(name, config))
    return replace(source, called=called, ignored=ignored) if called or ignored else source


def _of_mixtral(name: str) -> str:
    return re.sub(r"(?<=\.)w[123](?=\.)", lambda w: _PROJECTIONS[w[0]], name.replace(".block_sparse_moe.", ".mlp."))


def _is_further(name: str, config: ModelConfig) -> bool:
    """Of a layer that predicts further tokens, behind the last."""
    layer = _LAYER.match(name) if config.further_layers else None
    last = config.num_hidden_layers + config.further_layers
    return layer is not None and config.num_hidden_layers <= int(layer[1]) < last
