"""PyTorch's AdamW as the trainer calls every optimizer: with ``prefetch()`` and ``step(grad_scale=...)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsharded.utils.sharding import local


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose step takes the gradients' scale, and is skipped where that is not finite."""

    def prefetch(self) -> None:
        """Nothing: the state lies beside the parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` returns.

        Args:
            closure: computes the loss and the gradients.
            grad_scale: fp32 [], alike on all ranks; as :func:`clipping_scale` makes it. Gradients are multiplied by it
                in place. Where it is not finite nothing changes; to see that, the device is waited for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if grad_scale is not None:
            if not grad_scale.isfinite():
                return loss
            self._scale_gradients(grad_scale)
        super().step()
        return loss

    def _scale_gradients(self, scale: Tensor) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)
