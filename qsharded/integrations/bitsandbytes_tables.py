"""Whether a table that bitsandbytes hands to an operation holds our numbers."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_same: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_table(found: Tensor, ours: Tensor) -> bool:
    """Compared once a tensor: on a GPU a comparison waits for it."""
    if found not in _same:
        if found.is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # a graph's inputs are copies of tensors that the run before it compared
        _same[found] = found.shape == ours.shape and torch.equal(found, ours)
    return _same[found]
