"""The ways to checkpoint activations. Apart from ``recompute``, for who names them and has no need of PyTorch."""

from typing import Literal

Mode = Literal["none", "selective", "full", "offloaded"]
"""none keeps all that a backward reads; selective keeps what attention takes and puts out, the dearest for its size;
full keeps a block's input alone; offloaded keeps that in host memory. Each takes less memory than the one before."""
