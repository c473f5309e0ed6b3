"""AdamW whose state takes two bytes a parameter, shards with FSDP2, and lives in host memory where the GPU has no room.

The step is ``reference``'s; where state lies is ``store``'s, ``arena``'s and ``paging``'s business.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qsharded.optim.local_values import agree_on_maximum
from qsharded.optim.paging import BUCKET_BYTES, PageBudget, check_page_budget
from qsharded.optim.reference import Coefficient
from qsharded.optim.state import joined, part_of
from qsharded.optim.store import Store, upload
from qsharded.utils.argument_kinds import refuse_other_kind


class PagedAdamW8bit(Optimizer):
    """AdamW (arXiv:1711.05101) with blockwise 8-bit moments (arXiv:2110.02861), formats as bitsandbytes' AdamW8bit.

    Parameters are fp32 or bf16, plain tensors or DTensors, on one device. Those of fewer than 4,096 values keep fp32
    moments. State is made in the first step, for every parameter that requires a gradient.

    A step in which a gradient is not finite changes nothing, on any rank. It is counted in ``skipped_steps``, a tensor
    on the parameters' device; nothing in :meth:`step` waits for the device.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; ``lr`` may be a tensor.
        page_budget: how much 8-bit state stays on the device. "auto" keeps all of it while there is room in the first
            step, the rest is paged; "none" pages nothing, "max" everything; a number is the bytes that may stay.
        bucket_bytes: paged state moves in buckets of this size. Two are on the device beside the budget, and with "max"
            256 MiB more of them.

    Raises:
        ValueError: a value out of its range, or an argument of another kind.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        page_budget: PageBudget = "auto",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        check_page_budget(page_budget)
        refuse_other_kind(params, Iterable, "params", "a model's parameters(), or a list of groups")
        self.page_budget, self.bucket_bytes = page_budget, bucket_bytes
        self.skipped_steps = torch.zeros((), dtype=torch.int64)
        self._store: Store | None = None
        self._store_is_current = False
        self._idle: list[Tensor] = []  # parameters outside the store: they do not train so far
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; the state of the others stays."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        self._store_is_current = False

    def prefetch(self) -> None:
        """Start to copy paged state to the device. Call it before the backward pass, which hides the copies; without it
        they begin in :meth:`step`."""
        if self._store is not None and self._store_is_current:
            self._store.prefetch()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` returns.

        Args:
            closure: computes the loss and the gradients.
            grad_scale: fp32 [] on the parameters' device, alike on all ranks. Gradients are multiplied by it as they
                are used, and stay as they are. The step is skipped where it is not finite, and nothing else decides
                that: it must be so where a gradient is not finite, as :func:`clipping_scale` makes it.

        Raises:
            ValueError: parameters or gradients of a kind that is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        store = self._current_store()
        if store is not None:
            gradients = store.gradients()
            skip = self._skip(gradients, grad_scale)
            self.skipped_steps += skip.long()
            store.update(gradients, self._coefficients(store, gradients, grad_scale, skip), skip)
        return loss

    def _current_store(self) -> Store | None:
        """The store of all parameters that train; made anew where they or their devices have changed."""
        idle = not any(map(_trains, self._idle))
        if not (self._store_is_current and idle and (self._store is None or self._store.fits())):
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self._idle = [parameter for parameter in parameters if not _trains(parameter)]
            self._store = self._new_store([parameter for parameter in parameters if _trains(parameter)])
            self._store_is_current = True
        return self._store

    def _new_store(self, parameters: list[Tensor]) -> Store | None:
        if not parameters:
            return None
        store = Store(parameters, self.page_budget, self.bucket_bytes, freed_bytes=self._give_up_store())
        for parameter in parameters:
            if self.state[parameter]:
                store.load(parameter, part_of(self.state[parameter], parameter))
            self.state[parameter] = store.state_of(parameter)
        self.skipped_steps = self.skipped_steps.to(store.device)
        group_of = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        self._group_of_row = torch.tensor([group_of[p] for p in store.parameters], device=store.device)
        return store

    def _give_up_store(self) -> int:
        """Move the state to the host, so that the device need not hold it twice; returns the device bytes given up."""
        if self._store is None:
            return 0
        self.synchronize()
        for parameter, state in self.state.items():
            copies = {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}
            self.state[parameter] = copies
        freed, self._store = self._store.device_bytes, None
        return freed

    def _skip(self, gradients: list[Tensor | None], grad_scale: Tensor | None) -> Tensor:
        """fp32 []: 1 where a gradient of any rank is not finite, else 0."""
        assert self._store is not None
        if grad_scale is not None:
            if grad_scale.device != self._store.device or grad_scale.numel() != 1:
                raise ValueError(f"grad_scale must be one number on {self._store.device}, got {grad_scale}")
            return (~grad_scale.isfinite()).float()
        found = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
        flag = torch.zeros((), device=self._store.device)
        if found:
            flag = (~torch.stack(torch._foreach_norm(found, torch.inf)).isfinite().all()).float()
        agree_on_maximum(flag, self._store.parameters)
        return flag

    def _coefficients(
        self, store: Store, gradients: list[Tensor | None], grad_scale: Tensor | None, skip: Tensor
    ) -> Tensor:
        """fp32 [parameters, 9] of this step, as ``reference`` has them; computed in fp64, on the device."""
        active = [gradient is not None for gradient in gradients]
        store.steps += (1 - skip) if all(active) else upload(active, torch.float32, store.device) * (1 - skip)
        coefficients, t = self._group_coefficients(store.device)[self._group_of_row], store.steps.double()
        if grad_scale is not None:
            coefficients[:, Coefficient.GRADIENT_SCALE] *= grad_scale
        coefficients[:, Coefficient.STEP_SIZE] /= 1 - coefficients[:, Coefficient.BETA1] ** t
        coefficients[:, Coefficient.ROOT_SCALE] = (1 - coefficients[:, Coefficient.BETA2] ** t).rsqrt()
        return coefficients.float()

    def _group_coefficients(self, device: torch.device) -> Tensor:
        """fp64 [groups, 9]: the same before scaling and bias correction. A learning rate on the device stays there."""
        table = upload([_coefficients_of(group) for group in self.param_groups], torch.float64, device)
        for row, group in zip(table, self.param_groups, strict=True):
            if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
                row[Coefficient.STEP_SIZE] = group["lr"].squeeze()
                row[Coefficient.DECAY] = 1 - row[Coefficient.STEP_SIZE] * group["weight_decay"]
        return table

    def synchronize(self) -> None:
        """Wait until the state is up to date where it lies. :meth:`state_dict` does so by itself."""
        if self._store is not None:
            self._store.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """As in every optimizer: codes and scales as they are, each rank's own.

        A parameter's state: ``step``, ``state1``, ``state2``, ``absmax1``, ``absmax2``, and ``first_value`` and
        ``values``, where this shard begins in the whole parameter and how many values that has, in row order.
        """
        self.synchronize()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As in every optimizer. State of whole parameters, as ``optim.state.merged`` makes it, is cut to the shards.

        Raises:
            ValueError: groups or shapes that are not this optimizer's.
        """
        super().load_state_dict(dict(state_dict) | {"state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            if index in state_dict["state"]:
                self._take(parameter, state_dict["state"][index])
        self._store_is_current = False

    def parameter_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of a parameter's state, this rank's; empty before the first step."""
        self.synchronize()
        return {name: value for name, value in self.state.get(parameter, {}).items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def set_parameter_state(self, parameter: Tensor, written: Sequence[Any]) -> None:
        """Take this rank's state from what :meth:`parameter_state` gave on the ranks of an earlier run.

        Args:
            parameter: one of this optimizer's, sharded now.
            written: objects with ``start``, ``stop`` (rows of the parameter) and ``tensors``, whose rows hold at least
                this shard's.

        Raises:
            ValueError: rows that are missing, or state of another optimizer.
        """
        for rows in written:
            if rows.tensors and "state1" not in rows.tensors:
                raise ValueError(f"not a state of 8-bit AdamW but another optimizer's: {', '.join(rows.tensors)}")
        width = parameter.numel() // max(parameter.shape[0], 1) if parameter.dim() else 1
        places = [{"first_value": rows.start * width, "values": parameter.numel()} for rows in written]
        states = [dict(rows.tensors) | place for rows, place in zip(written, places, strict=True) if rows.tensors]
        if states:
            self._take(parameter, joined(states))

    def _take(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        part = part_of(state, parameter)
        self.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in part.items()}
        self._store_is_current = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the store: a copy makes its own of the state."""
        self.synchronize()
        names = ("page_budget", "bucket_bytes", "skipped_steps")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_store", None)
        self.__dict__.setdefault("_idle", [])
        self._store_is_current = False


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None


def clipping_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of total ``norm`` are multiplied by to have at most ``max_norm``, as in PyTorch's
    ``clip_grads_with_norm_``; 0 clips nothing. NaN where the norm is not finite, so that the step is skipped."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm else torch.ones_like(norm)
    return torch.where(norm.isfinite(), scale, torch.nan).float()


def _coefficients_of(group: Mapping[str, Any]) -> tuple[float, ...]:
    """A group's coefficients before scaling and bias correction; those of a learning rate on a GPU are left open."""
    rate, (beta1, beta2) = group["lr"], group["betas"]
    rate = 0.0 if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)
    sign, decay = -1.0 if group["maximize"] else 1.0, 1 - rate * group["weight_decay"]
    return sign, beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], decay, rate, 0.0


def _check_group(group: Mapping[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got {group['lr'].shape}")
    for name in ("lr", "eps", "weight_decay"):
        refuse_other_kind(group[name], (int, float, Tensor), name, "a number")
        if not isinstance(group[name], Tensor) and not group[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be at least 0 and below 1, got {group['betas']}")
