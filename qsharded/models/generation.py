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
from qsharded.models.decoding import GraphDecoding, can_replay
from qsharded.models.sampling import NOT_FINITE, Sampling
from qsharded.utils import collectives
from qsharded.utils.documents import PADDING

_KEYS = 8  # a cache has room for whole eights of them: attention reads masks 16 bytes at a time


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
    graphs: bool = False,
) -> list[list[int]]:
    """Continue each prompt; return the new tokens of each, without the end-of-sequence token that stopped it.

    temperature, top_k, top_p: as in :class:`Sampling`, drawn with `seed`.
    on_token(prompt's number, token) is called for every token as it comes, before_forward() before every forward.
    graphs: replay CUDA graphs from the second token on where they serve (:mod:`qsharded.models.decoding`), for answers
    of more than some ten tokens.

    Where torch.distributed is initialised, every rank must call this: ranks stop together, so that a sharded model
    sees the same number of forwards on each. Dropout is off meanwhile.

    Raises ValueError for an empty prompt or no prompt, and for settings out of range; LogitsNotFinite, on all ranks.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(prompts, max_new_tokens)
    answers = [_Answer(eos_ids) for _ in prompts]
    device = _device(model)
    with _evaluating(model):
        steps = _steps(model, prompts, max_new_tokens, sampling, seed, graphs, before_forward)
        for tokens in steps:
            _refuse_not_finite(tokens, device)
            for index, token in enumerate(tokens):
                if answers[index].take(token) and on_token is not None:
                    on_token(index, token)
            if _all_ranks(all(answer.stopped for answer in answers), device):
                break
    return [answer.tokens for answer in answers]


def _steps(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    graphs: bool,
    before_forward: Callable[[], object],
) -> Iterator[list[int]]:
    """The rows' next tokens, as often as asked for, at most ``max_new_tokens`` times."""
    device = _device(model)
    ids_BS, positions_BS, documents_BS = _left_pad(prompts, device)
    cache = model.new_cache(-(-(ids_BS.shape[1] + max_new_tokens) // _KEYS) * _KEYS)
    generator = torch.Generator(device).manual_seed(seed)
    noise_BV: Tensor | None = None
    gaps_B1 = None if documents_BS is None else (documents_BS == PADDING).sum(dim=1, keepdim=True)
    replays = graphs and can_replay(model)
    for step in range(max_new_tokens):
        before_forward()
        inputs = {"positions_BS": positions_BS, "document_ids_BS": documents_BS, "cache": cache}
        logits_BV = model(ids_BS, **inputs, last_only=True)[:, -1]
        if step == 0:
            noise_BV = sampling.noise(logits_BV)
        if noise_BV is not None:
            noise_BV.exponential_(generator=generator)
        next_B = sampling.choose(logits_BV, noise_BV)
        yield next_B.tolist()
        ids_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
        if documents_BS is not None:
            documents_BS = documents_BS[:, -1:]  # the last position is never padding
        if replays:
            last_B1 = positions_BS - 1
            decoding = GraphDecoding(model, cache, next_B, last_B1, gaps_B1, sampling, noise_BV, generator)
            yield from decoding.tokens(max_new_tokens - 1)
            return


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


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("prompts is empty: give at least one (on every rank)")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} has no tokens: start it with the tokenizer's BOS token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


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


def _refuse_not_finite(tokens: Sequence[int], device: torch.device) -> None:
    """On all ranks, should it be on one: the others would wait for it in the next forward."""
    if not _all_ranks(NOT_FINITE not in tokens, device):
        raise LogitsNotFinite(
            "the model's logits are not finite: weights of the model or its adapter are damaged, or training diverged"
        )


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
