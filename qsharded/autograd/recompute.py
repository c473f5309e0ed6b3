"""Which of a block's activations wait for its backward, and which are computed again.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "selective", "full", "offloaded"]
"""none keeps every activation; selective keeps what attention and the packed matmuls put out, the dearest to compute;
full keeps a block's input alone; offloaded keeps that in host memory."""

Forward = Callable[..., Tensor]


def recomputed(forwards: list[Forward], mode: Mode) -> list[Forward]:
    """The blocks' forwards, in their order, each ``(x, *others) -> y``, so wrapped as ``mode`` says."""
    if mode == "none":
        return forwards
    if mode == "offloaded":
        waiting = _Waiting()
        return [functools.partial(_with_input_on_host, waiting, forward) for forward in forwards]
    context = {"context_fn": _keep_dearest} if mode == "selective" else {}
    return [functools.partial(checkpoint, forward, use_reentrant=False, **context) for forward in forwards]


def _keep_dearest() -> Any:
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts(
        [
            torch.ops.qsharded.nf4_linear.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )


def _with_input_on_host(waiting: "_Waiting", forward: Forward, x: Tensor, *others: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, *others)
    boundary = waiting.store(x)
    # x itself is no argument, or the checkpoint would keep it
    y: Tensor = checkpoint(lambda *others: forward(boundary.take(), *others), *others, use_reentrant=False)
    return y


class _Waiting:
    """The inputs that wait in host memory, as a chain: while one block is recomputed, the one before it is fetched."""

    def __init__(self) -> None:
        self._newest: weakref.ref[_Boundary] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def store(self, x: Tensor) -> "_Boundary":
        boundary = _Boundary(x, self._stream(x.device), self._newest)
        self._newest = weakref.ref(boundary)
        return boundary

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        return self._streams.setdefault(device, torch.cuda.Stream(device))


class _Boundary:
    """One block's input: given to the block's forward, copied to the host beside it, and fetched for its backward.

    On a CPU, where ``stream`` is None, the input stays as it is.
    """

    def __init__(
        self, x: Tensor, stream: torch.cuda.Stream | None, previous: "weakref.ref[_Boundary] | None"
    ) -> None:
        self._given: Tensor | None = x
        self._stream, self._previous = stream, previous
        self._requires_grad = x.requires_grad
        self._on_host = x.detach() if stream is None else self._copied_out(x.detach(), stream)
        self._fetched: tuple[Tensor, torch.cuda.Event | None] | None = None

    def take(self) -> Tensor:
        """The input: in the forward the very tensor, in the recomputation its copy."""
        if self._given is not None:
            given, self._given = self._given, None
            return given
        x, arrived = self._fetched or self._fetch()
        self._fetched = None
        previous = self._previous() if self._previous else None
        if previous is not None:
            previous._fetched = previous._fetch()
        if arrived is not None:
            torch.cuda.current_stream(x.device).wait_event(arrived)
            x.record_stream(torch.cuda.current_stream(x.device))  # it was allocated on the copying stream
        return x.requires_grad_(self._requires_grad)

    def _copied_out(self, x: Tensor, stream: torch.cuda.Stream) -> Tensor:
        on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            on_host.copy_(x, non_blocking=True)
        x.record_stream(stream)
        return on_host

    def _fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._stream is None:
            return self._on_host.detach(), None
        with torch.cuda.stream(self._stream):  # behind the copy to the host
            x = self._on_host.to(self._stream.device, non_blocking=True)
            return x, self._stream.record_event()
