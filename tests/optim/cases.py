"""Parameters, gradients and models that optimizer tests share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[Sequence[Any]], Optimizer]
# large ones in both types, of a size that fills no whole blocks, and small ones, which keep fp32 moments
SHAPES = [((64, 65), torch.float32), ((7,), torch.float32), ((70, 70), torch.bfloat16), ((33,), torch.bfloat16)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in SHAPES]


def hard_gradients(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Of all magnitudes, with runs of zeros, signed zeros, denormals and a block whose squares are beyond fp32."""
    generator = torch.Generator().manual_seed(seed)
    return [_hard(tensor, generator) for tensor in like]


def _hard(like: Tensor, generator: torch.Generator) -> Tensor:
    magnitudes = 10.0 ** torch.randint(-6, 4, like.shape, generator=generator)
    values = (torch.randn(like.shape, generator=generator) * magnitudes).view(-1)
    if values.numel() > 3000:
        values[300:900] = 0
        values[1024:1100] = -0.0
        values[1300:1500] = torch.randn(200, generator=generator) * 1e-40
        values[2560:2816] = (torch.rand(256, generator=generator) * 2 - 1) * 3e38
    return values.view(like.shape).to(like.dtype)


def train(optimizer: Optimizer, steps: int, *, seed: int = 0, skip: Sequence[tuple[int, int]] = ()) -> None:
    """Steps with hard gradients; parameter p has none in step s where (s, p) is in ``skip``."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(steps):
        for number, (parameter, gradient) in enumerate(zip(held, hard_gradients(held, seed + step), strict=True)):
            parameter.grad = None if (step, number) in skip else gradient.to(parameter.device)
        optimizer.step()


class TinyTransformer(nn.Module):
    """A block of causal attention and a feed-forward layer over 64 tokens, 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.block = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.block(self.embedding(ids), src_mask=mask, is_causal=True))


def final_transformer_loss(make: MakeOptimizer, steps: int) -> float:
    """The mean loss of the last 50 of so many steps of learning a random walk's next place."""
    torch.manual_seed(0)
    model = TinyTransformer()
    optimizer = make(list(model.parameters()))
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        walk = torch.randint(-1, 2, (4, 17), generator=generator).cumsum(1).add(32) % 64
        loss = F.cross_entropy(model(walk[:, :-1]).flatten(0, 1), walk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50
