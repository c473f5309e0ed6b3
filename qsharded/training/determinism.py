"""The same bits from the same run on a GPU, for ``--deterministic``."""

import os

import torch


def use_deterministic_algorithms() -> None:
    """Have PyTorch run nothing whose sums change their order from one time to the next. Call before a GPU is used.

    On the CPU nothing does. An operation that has no other form raises RuntimeError, by name, where it is called.
    Attention takes the deterministic backward of its flash and memory-efficient kernels, and leaves cuDNN's out.
    """
    # cuBLAS reads this when its first handle is made; with its default, streams share workspaces in changing order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # It would write NaN over every buffer of a gather before it is filled; nothing is read here that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
