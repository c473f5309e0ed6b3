"""Which of a layer's activations wait for its backward, and which are computed again.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from qsharded.utils.checkpointing_modes import Mode

Forward = Callable[..., Tensor]


def recomputed(forwards: list[Forward], mode: Mode) -> list[Forward]:
    """The layers' forwards, in their order, each ``(x, *others) -> y``, so wrapped as ``mode`` says."""
    if mode == "none":
        return forwards
    if mode == "offloaded":
        waiting = Waiting()
        return [functools.partial(_with_input_on_host, waiting, forward) for forward in forwards]
    again = functools.partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        again = functools.partial(again, context_fn=_keep_dearest)
    return [functools.partial(again, forward) for forward in forwards]


def _keep_dearest() -> Any:
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts(
        [
            torch.ops.qsharded.nf4_linear.default,
            torch.ops.qsharded.nf4_linear.kind,
            aten._flash_attention_forward.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )


@torch.compiler.disable  # weak references and streams, of which a compiler knows nothing
def _with_input_on_host(waiting: "Waiting", forward: Forward, x: Tensor, *others: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, *others, **named)
    boundary = waiting.store(x)

    def again(_: Tensor) -> Tensor:
        return forward(boundary.take(), *others, **named)

    # x itself is no argument, or the checkpoint would keep it; by one it knows whose random numbers to draw again
    y: Tensor = checkpoint(again, x.new_empty(0), use_reentrant=False)
    return y


class Waiting:
    """The inputs that wait in host memory, as a chain: while one layer is recomputed, the one before it is fetched.

    All room on the GPU belongs to the compute stream, so that the allocator needs no events to hand it on: an input
    stays until its copy is waited for, at the next layer, and room for one that returns is taken before the copying
    stream is told to wait for what has been queued.
    """

    def __init__(self) -> None:
        self._newest: weakref.ref[_Boundary] | None = None
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._stream: torch.cuda.Stream | None = None

    def store(self, x: Tensor) -> "_Boundary":
        boundary = _Boundary(self, x, self._newest)
        self._newest = weakref.ref(boundary)
        return boundary

    def copy_out(self, x: Tensor) -> Tensor:
        """``x`` in host memory, from when the copying stream has come so far; on a CPU ``x`` itself."""
        if x.device.type != "cuda":
            return x
        self.let_go()
        on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        with torch.cuda.stream(self._behind_compute(x.device)):
            on_host.copy_(x, non_blocking=True)
            self._leaving = x, torch.cuda.current_stream(x.device).record_event()
        return on_host

    def copy_in(self, on_host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """``on_host`` on the device again, from when the event has come."""
        if device.type != "cuda":
            return on_host.detach(), None
        x = torch.empty(on_host.shape, dtype=on_host.dtype, device=device)
        with torch.cuda.stream(self._behind_compute(device)):
            x.copy_(on_host, non_blocking=True)
            return x, torch.cuda.current_stream(device).record_event()

    def let_go(self) -> None:
        """Free the input that was copied out last; the compute stream waits until it is."""
        if self._leaving is not None:
            x, copied = self._leaving
            torch.cuda.current_stream(x.device).wait_event(copied)
            self._leaving = None

    def _behind_compute(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream


class _Boundary:
    """One layer's input: given to the layer's forward, copied to the host beside it, and fetched for its backward."""

    def __init__(self, waiting: Waiting, x: Tensor, previous: "weakref.ref[_Boundary] | None") -> None:
        self._waiting, self._previous = waiting, previous
        self._given: Tensor | None = x
        self._device, self._requires_grad = x.device, x.requires_grad
        self._on_host = waiting.copy_out(x.detach())
        self._fetched: tuple[Tensor, torch.cuda.Event | None] | None = None

    def leave(self) -> "_Boundary":
        """Let go of the input itself: whoever has it used it already."""
        self._given = None
        return self

    def take(self) -> Tensor:
        """The input: in the forward the very tensor, in the recomputation its copy."""
        if self._given is not None:
            given, self._given = self._given, None
            return given
        self._waiting.let_go()
        x, arrived = self._fetched or self._fetch()
        self._fetched = None
        previous = self._previous() if self._previous else None
        if previous is not None:
            previous._fetched = previous._fetch()
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        return x.requires_grad_(self._requires_grad)

    def _fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        return self._waiting.copy_in(self._on_host, self._device)
