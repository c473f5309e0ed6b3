"""Tokens from a model: greedy or sampled, a batch of ragged prompts at a time.

Axes: B batch, S prompt length (the longest), V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsharded.models.decoder import CausalLM
from qsharded.utils import collectives
from qsharded.utils.documents import PADDING


class LogitsNotFinite(ValueError):
    """The model's logits hold NaN or infinity, of which no token can be chosen."""


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    before_forward: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt; return the new tokens of each, without the end-of-sequence token that stopped it.

    temperature 0 takes the likeliest token. Otherwise tokens are sampled with `seed` from the `top_k` likeliest (0:
    all), and of these from the likeliest that together reach probability `top_p` (https://arxiv.org/abs/1904.09751).
    on_token(prompt's number, token) is called for every token as it comes, before_forward() as often on every rank.

    Where torch.distributed is initialised, every rank must call this: ranks stop together, so that a sharded model
    sees the same number of forwards on each. Dropout is off meanwhile.

    Raises ValueError for an empty prompt or no prompt, and for settings out of range; LogitsNotFinite, on all ranks.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    device = _device(model)
    ids_BS, positions_BS, documents_BS = _left_pad(prompts, device)
    cache = model.new_cache(ids_BS.shape[1] + max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    answers = [_Answer(eos_ids) for _ in prompts]

    with _evaluating(model):
        for _ in range(max_new_tokens):
            before_forward()
            logits_BV = model(
                ids_BS, positions_BS=positions_BS, document_ids_BS=documents_BS, cache=cache, last_only=True
            )[:, -1]
            _refuse_not_finite(logits_BV)
            next_B = _choose(logits_BV, temperature, top_k, top_p, generator)
            for index, token in enumerate(next_B.tolist()):
                if answers[index].take(token) and on_token is not None:
                    on_token(index, token)
            if _all_ranks(all(answer.stopped for answer in answers), device):
                break
            ids_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
            if documents_BS is not None:
                documents_BS = documents_BS[:, -1:]  # the last position is never padding
    return [answer.tokens for answer in answers]


def _device(model: nn.Module) -> torch.device:
    """Where the model computes: frozen parameters may wait in host memory, buffers never do."""
    return next(chain(model.buffers(), model.parameters())).device


class _Answer:
    """The tokens of one prompt's continuation, up to the first end-of-sequence token."""

    def __init__(self, eos_ids: Collection[int]) -> None:
        self.eos_ids = frozenset(eos_ids)
        self.tokens: list[int] = []
        self.stopped = False

    def take(self, token: int) -> bool:
        """Add `token`, or stop at it; True where it was added."""
        self.stopped = self.stopped or token in self.eos_ids
        if not self.stopped:
            self.tokens.append(token)
        return not self.stopped


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if not prompts:
        raise ValueError("prompts is empty: give at least one (on every rank)")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} has no tokens: start it with the tokenizer's BOS token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, positions and document ids `[B, S]`. Padding goes left so that all rows' next tokens line up.

    No padding, no document ids: attention then needs no mask.
    """
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    positions = [[0] * gap + list(range(longest - gap)) for gap in gaps]
    documents = [[PADDING] * gap + [0] * (longest - gap) for gap in gaps]
    ids_BS, positions_BS, documents_BS = (torch.tensor(rows, device=device) for rows in (ids, positions, documents))
    return ids_BS, positions_BS, documents_BS if any(gaps) else None


def _refuse_not_finite(logits_BV: Tensor) -> None:
    """On all ranks, should it be on one: the others would wait for it in the next forward."""
    if not _all_ranks(bool(logits_BV.isfinite().all()), logits_BV.device):
        raise LogitsNotFinite(
            "the model's logits are not finite: weights of the model or its adapter are damaged, or training diverged"
        )


def _choose(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row, `[B]`."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p < 1:
        logits_BV = _nucleus(logits_BV, top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Rule out every token whose likelier ones already reach `top_p` together (the likeliest always stays)."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    chances_BV = sorted_BV.softmax(dim=-1)
    likelier_BV = chances_BV.cumsum(dim=-1) - chances_BV
    return sorted_BV.masked_fill(likelier_BV >= top_p, -torch.inf).gather(-1, order_BV.argsort(dim=-1))


def _all_ranks(done: bool, device: torch.device) -> bool:
    """Whether `done` holds on every rank."""
    group = collectives.every_rank()
    if group is None:
        return done  # no flag that the GPU has to be waited for
    flag = torch.tensor(int(done), device=device)
    return bool(collectives.all_reduce(flag, dist.ReduceOp.MIN, group).item())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
