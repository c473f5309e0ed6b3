from types import SimpleNamespace

import torch
from torch import Tensor, nn

from qsharded.models.generation import generate
from qsharded.models.kv_cache import KVCache

from .harness import run_ranks


class _Counter(nn.Module):
    """Stands in for a model: always says the last token + 1, and counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=0)
        self.anchor = nn.Parameter(torch.zeros(()))
        self.forwards = 0

    def new_cache(self, length: int) -> KVCache:
        return KVCache(0, length)

    def forward(self, input_ids_BS: Tensor, **_: object) -> Tensor:
        self.forwards += 1
        return nn.functional.one_hot(input_ids_BS[:, -1:] + 1, 50).float()


def _generate_on_rank() -> tuple[list[list[int]], int]:
    rank = torch.distributed.get_rank()
    model = _Counter()
    tokens = generate(model, [[3 * rank]], max_new_tokens=40, eos_ids=[9])
    return tokens, model.forwards


def test_ranks_with_other_prompts_run_the_same_number_of_forwards() -> None:
    (first, first_forwards), (second, second_forwards) = run_ranks(_generate_on_rank, 2)
    assert (first, second) == ([[1, 2, 3, 4, 5, 6, 7, 8]], [[4, 5, 6, 7, 8]])
    assert first_forwards == second_forwards == 9
