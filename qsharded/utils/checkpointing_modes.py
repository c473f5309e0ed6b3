"""The ways to checkpoint activations. Apart from ``recompute``, for who names them and has no need of PyTorch."""

from typing import Literal

Mode = Literal["none", "selective", "full", "offloaded"]
"""none keeps every activation; selective keeps what attention and the packed matmuls put out, the dearest to compute;
full keeps a block's input alone; offloaded keeps that in host memory. Each takes less memory than the one before."""
