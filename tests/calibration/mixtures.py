"""The experts of a layer with tokens that are told where to go. Ranks import this: transformers would take seconds."""

import torch
from torch import Tensor

from qsharded.calibration.expert_inputs import ExpertInputs
from qsharded.calibration.expert_rounding import ExpertRounding
from qsharded.calibration.method import Calibration
from qsharded.models import ModelConfig
from qsharded.models.mixture import Experts
from qsharded.quant.routing import Routed
from tests.calibration.cases import inputs
from tests.checkpoints import LLAMA

D, J = 128, 64


def random_experts(count: int) -> Experts:
    """A layer's, in fp32."""
    sizes = {"num_experts": count, "num_experts_per_tok": 1, "moe_intermediate_size": J}
    described = LLAMA | {"model_type": "qwen3_moe", "architectures": None, "hidden_size": D, "head_dim": 32, **sizes}
    torch.manual_seed(0)
    experts = Experts(ModelConfig.from_hf(described)).requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_(std=0.1)
    return experts


def tokens(counts: list[int], seed: int = 0) -> list[Tensor]:
    """So many for each expert, which differ from those of others by more than chance."""
    return [
        inputs(n, D, seed=100 * seed + e) + torch.randn(D, generator=torch.Generator().manual_seed(e))
        for e, n in enumerate(counts)
    ]


def outputs(experts: Experts, of_experts: list[Tensor]) -> list[Tensor]:
    """What the experts make of their own tokens, which come in an order of their own."""
    x_MD = torch.cat(of_experts)
    chosen_M = torch.repeat_interleave(torch.arange(len(of_experts)), torch.tensor([len(x) for x in of_experts]))
    order_M = torch.randperm(len(x_MD), generator=torch.Generator().manual_seed(5))
    routed = Routed.of(chosen_M[order_M, None], len(of_experts))
    y_MD = experts(x_MD[order_M], torch.ones(len(x_MD), 1), routed)
    return [y_MD[chosen_M[order_M] == e] for e in range(len(of_experts))]


def rounding(experts: Experts, of_experts: list[Tensor], how: Calibration) -> ExpertRounding:
    """The experts, rounded in place for their tokens, which come in two passes."""
    seen = ExpertInputs(experts)
    with seen.watched():
        outputs(experts, [x[: len(x) // 2] for x in of_experts])
        outputs(experts, [x[len(x) // 2 :] for x in of_experts])
    made = ExpertRounding(experts, "experts", seen, how)
    made.run()
    return made
