"""Our AdamW step behind ``bitsandbytes::optimizer_update_8bit_blockwise``, for one tensor at a time.

It serves "adam" (which AdamW8bit and Adam8bit call) on whole blocks of 256, in fp32 and bf16, with bitsandbytes' own
maps, by the compiled library on a GPU, where a tensor has 2^21 values and more; whatever else goes to bitsandbytes. On
CPUs there is no compiled step of ours.

What differs from bitsandbytes' kernel for GPUs: it takes 1 - beta in fp32 and fuses multiplications with additions, so
that scales agree to about five digits and codes to one step, where a value lies next to a threshold. (A block that is
zero throughout has our codes of 0; theirs are of 0/0, and mean 0 too.) Its quotients and the powers of its bias
correction are approximate, which moves the first updates by some parts in ten thousand. It applies the weight decay
after the update, we before it; it rounds a bf16 parameter after each of the two, we once. It launches on the default
stream, we on the current one. As there, a value whose gradient is not finite stays, and its moments become 0.
Source of theirs: kOptimizerStatic8bit2StateBlockwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsharded.integrations.bitsandbytes_tables import is_table
from qsharded.optim.kernels import optimizer_kernels, step_tables
from qsharded_kernels import adamw8bit_checks, cuda_adamw8bit

# Its optimizers wait for each tensor, and our call takes the host longer: on an H200 tensors of 1.8 million values step
# as fast on either kernel, of 4.2 million 1.4 times and of 59 million 5 times as fast on ours
# (benchmarks.bitsandbytes_optimizer).
FEWEST_VALUES = 1 << 21


def update(before: Callable[..., Any]) -> Callable[..., None]:
    """The operation, with ``before`` for what is not ours."""

    def optimizer_update_8bit_blockwise(
        optimizer_name: str,
        g: Tensor,
        p: Tensor,
        state1: Tensor,
        state2: Tensor | None,
        beta1: float,
        beta2: float,
        beta3: float,
        alpha: float,
        eps: float,
        step: int,
        lr: float,
        qmap1: Tensor,
        qmap2: Tensor | None,
        absmax1: Tensor,
        absmax2: Tensor | None,
        weight_decay: float,
        gnorm_scale: float,
        skip_zeros: bool = False,
    ) -> None:
        of_adam = optimizer_name == "adam" and not skip_zeros
        if of_adam and state2 is not None and qmap2 is not None and absmax2 is not None:
            tables = step_tables(p.device)
            if _fits(g, p, state1, state2) and is_table(qmap1, tables[0]) and is_table(qmap2, tables[1]):
                coefficients = _coefficients(beta1, beta2, eps, step, lr, weight_decay, gnorm_scale)
                cuda_adamw8bit.update_alone(p, g, state1, state2, absmax1, absmax2, coefficients, tables)
                return
        moments = state1, state2, beta1, beta2, beta3, alpha, eps, step, lr
        before(optimizer_name, g, p, *moments, qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale, skip_zeros)

    return optimizer_update_8bit_blockwise


def _fits(g: Tensor, p: Tensor, state1: Tensor, state2: Tensor) -> bool:
    """Whether our kernel takes these tensors, and pays. Paged state is managed memory that PyTorch sees on the CPU."""
    return (
        p.numel() >= FEWEST_VALUES
        and g.dtype == p.dtype in (torch.float32, torch.bfloat16)
        and p.numel() % adamw8bit_checks.STATE_BLOCK == 0
        and all(tensor.is_contiguous() for tensor in (g, p, state1, state2))
        and all(state.data_ptr() % adamw8bit_checks.STATE_ALIGNMENT == 0 for state in (state1, state2))
        and optimizer_kernels(p.device) is cuda_adamw8bit
    )


def _coefficients(
    beta1: float, beta2: float, eps: float, step: int, lr: float, weight_decay: float, gnorm_scale: float
) -> tuple[float, ...]:
    """As ``qsharded.optim.reference.adamw_`` takes them."""
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return gnorm_scale, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, rate, root
