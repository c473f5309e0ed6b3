"""Embedding, logits and loss over a vocabulary that is cut over the ranks equal those over a whole one."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from qsharded.distributed import vocab_parallel_autograd, vocab_parallel_loss
from qsharded.utils import collectives
from qsharded.utils.sharding import RowRange, rows_of_rank
from tests.distributed.harness import run_ranks

DIM = 12
# fp64 sums in another order: some 1e-15 of values near 1. In bf16 each rank's part of a gradient is rounded once more.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, of which each rank has another number, and the whole weight, the same on each."""
    weight_VD = torch.randn(vocab, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(7 + rank)
    hidden_TD = torch.randn(5 + 3 * rank, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ids_T = torch.randint(vocab, (5 + 3 * rank,), generator=generator)
    ids_T[:2] = torch.tensor([0, vocab - 1])  # the first row and the last are somebody's
    return hidden_TD, weight_VD, ids_T


def own(weight_VD: Tensor) -> tuple[Tensor, RowRange]:
    total = weight_VD.shape[0]
    start, stop = rows_of_rank(total, dist.get_world_size(), dist.get_rank())
    return weight_VD[start:stop], RowRange(start, stop, total, dist.group.WORLD)


def relative_gap(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def loss_gaps(vocab: int, dtype: torch.dtype, chunk_size: int | None) -> tuple[float, float]:
    """How far loss and gradient lie from PyTorch's of this rank's tokens alone."""
    hidden_TD, weight_VD, targets_T = inputs(vocab, dtype)
    targets_T[3] = -100
    if dist.get_rank() == 1:
        targets_T[:] = -100  # a rank with padding alone
    scale = 1 + dist.get_rank()  # what a rank does with its loss is its own affair
    loss = vocab_parallel_loss.cross_entropy(hidden_TD, *_split(weight_VD, targets_T), chunk_size)
    (loss * scale).backward()
    exact_TD = hidden_TD.detach().double().requires_grad_()
    expected = F.cross_entropy(exact_TD @ weight_VD.double().T, targets_T, reduction="sum")
    (expected * scale).backward()
    if dist.get_rank() == 1:
        return loss.item(), hidden_TD.grad.abs().max().item()
    return relative_gap(loss.detach(), expected.detach()), relative_gap(hidden_TD.grad, exact_TD.grad)


def _split(weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, RowRange]:
    weight_vD, rows = own(weight_VD)
    return weight_vD, targets_T, rows


@pytest.mark.parametrize(
    ("world_size", "vocab", "dtype", "chunk_size"),
    [
        (1, 17, torch.float64, 4),
        (2, 17, torch.float64, 3),  # shares of 9 and 8
        (2, 17, torch.bfloat16, None),
        (3, 32, torch.float64, None),
        (4, 5, torch.float64, 1),  # shares of 2, 2, 1 and none
    ],
)
def test_loss_and_gradient_equal_pytorchs(
    world_size: int, vocab: int, dtype: torch.dtype, chunk_size: int | None
) -> None:
    for gaps in run_ranks(loss_gaps, world_size, vocab, dtype, chunk_size):
        assert max(gaps) <= TOLERANCES[dtype]


def gaps_with_kernels(vocab: int, chunk_size: int | None, softcap: float | None) -> tuple[float, float]:
    """Those of the log-probabilities, by the kernels that a GPU takes, which are interpreted here."""
    vocab_parallel_loss._Chunk._has_kernels = lambda self: True
    return log_prob_gaps(vocab, torch.float32, chunk_size, softcap)


@pytest.mark.parametrize(("world_size", "vocab", "softcap"), [(2, 17, None), (4, 5, 0.7)])
def test_kernels_give_the_same_where_each_has_a_part_of_a_row(
    world_size: int, vocab: int, softcap: float | None
) -> None:
    for gaps in run_ranks(gaps_with_kernels, world_size, vocab, 3, softcap):
        assert max(gaps) <= TOLERANCES[torch.float32]


def log_prob_gaps(vocab: int, dtype: torch.dtype, chunk_size: int | None, softcap: float | None) -> tuple[float, float]:
    """How far each token's log-probability and the gradient lie from PyTorch's of this rank's tokens alone."""
    hidden_TD, weight_VD, targets_T = inputs(vocab, dtype)
    targets_T[3] = -100
    factors_T = torch.linspace(-2, 3, len(targets_T), dtype=torch.float64) * (1 + dist.get_rank())
    found_T = vocab_parallel_loss.log_probs(hidden_TD, *_split(weight_VD, targets_T), chunk_size, softcap)
    (found_T * factors_T).sum().backward()
    exact_TD = hidden_TD.detach().double().requires_grad_()
    logits_TV = exact_TD @ weight_VD.double().T
    logits_TV = logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)
    expected_T = -F.cross_entropy(logits_TV, targets_T, reduction="none")
    (expected_T * factors_T).sum().backward()
    assert found_T[3] == 0
    return relative_gap(found_T.detach(), expected_T.detach()), relative_gap(hidden_TD.grad, exact_TD.grad)


@pytest.mark.parametrize(
    ("world_size", "vocab", "dtype", "chunk_size", "softcap"),
    [
        (1, 17, torch.float64, 4, None),
        (2, 17, torch.float64, 3, 0.7),
        (2, 17, torch.bfloat16, None, None),
        (4, 5, torch.float64, 1, None),
    ],
)
def test_log_probabilities_and_their_gradient_equal_pytorchs(
    world_size: int, vocab: int, dtype: torch.dtype, chunk_size: int | None, softcap: float | None
) -> None:
    for gaps in run_ranks(log_prob_gaps, world_size, vocab, dtype, chunk_size, softcap):
        assert max(gaps) <= TOLERANCES[dtype]


def logits_gaps(vocab: int) -> tuple[float, float]:
    hidden_TD, weight_VD, ids_T = inputs(vocab, torch.float64)
    weight_vD, rows = own(weight_VD)
    found = vocab_parallel_autograd.logits(hidden_TD, weight_vD, rows)
    assert found.shape == (len(ids_T), vocab)
    F.cross_entropy(found, ids_T).backward()
    exact_TD = hidden_TD.detach().requires_grad_()
    expected = exact_TD @ weight_VD.T
    F.cross_entropy(expected, ids_T).backward()
    return relative_gap(found.detach(), expected.detach()), relative_gap(hidden_TD.grad, exact_TD.grad)


@pytest.mark.parametrize(("world_size", "vocab"), [(1, 17), (2, 17), (3, 32), (4, 5)])
def test_logits_and_their_gradient_equal_the_plain_product(world_size: int, vocab: int) -> None:
    for gaps in run_ranks(logits_gaps, world_size, vocab):
        assert max(gaps) <= TOLERANCES[torch.float64]


def gradient_of_small_parts() -> Tensor:
    """[T, 3]: of each column one rank's part is 1, and the two others' 2^-8, which bf16 drops beside a 1."""
    weight_VD = torch.full((3, 3), 2.0**-8).fill_diagonal_(1).bfloat16()
    hidden_TD = torch.zeros(2 + dist.get_rank(), 3, dtype=torch.bfloat16, requires_grad=True)
    vocab_parallel_autograd.logits(hidden_TD, *own(weight_VD)).sum().backward()
    return hidden_TD.grad


def test_the_ranks_parts_of_a_gradient_are_added_in_fp32() -> None:
    for found_TD in run_ranks(gradient_of_small_parts, 3):
        assert torch.equal(found_TD, torch.full_like(found_TD, 1 + 2.0**-7))


def sizes_looked_up(at_a_time: int) -> list[int]:
    """How many values each collective of a look-up sums, of all ranks together."""
    vocab_parallel_autograd._LOOKED_UP_AT_A_TIME = at_a_time
    reduce_scatter, sizes = collectives.reduce_scatter, []

    def watched(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        sizes.append(parts.nbytes // torch.bfloat16.itemsize)
        return reduce_scatter(parts, group)

    collectives.reduce_scatter = watched
    _, weight_VD, ids_T = inputs(17, torch.bfloat16)
    vocab_parallel_autograd.lookup(ids_T, *own(weight_VD))
    return sizes


def test_a_look_up_is_cut_by_what_it_brings_to_all_ranks_together() -> None:
    """8 tokens on the rank that has most, 12 values each: of 2 ranks 75 values are 3 tokens at a time."""
    for sizes in run_ranks(sizes_looked_up, 2, 75):
        assert sizes == [2 * 3 * DIM, 2 * 3 * DIM, 2 * 2 * DIM]


def looked_up(vocab: int, dtype: torch.dtype, at_a_time: int) -> bool:
    vocab_parallel_autograd._LOOKED_UP_AT_A_TIME = at_a_time
    _, weight_VD, ids_T = inputs(vocab, dtype)
    weight_VD[0, :2] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2])  # a sum of floats would lose both
    weight_vD, rows = own(weight_VD)
    found_TD = vocab_parallel_autograd.lookup(ids_T, weight_vD, rows)
    return torch.equal(found_TD.view(torch.int32), weight_VD[ids_T].view(torch.int32))


@pytest.mark.parametrize(
    ("world_size", "vocab", "at_a_time"), [(1, 17, 1 << 25), (2, 17, 60), (3, 32, 1 << 25), (4, 5, 1)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_are_looked_up_to_the_last_bit(world_size: int, vocab: int, at_a_time: int, dtype: torch.dtype) -> None:
    assert all(run_ranks(looked_up, world_size, vocab, dtype, at_a_time))


def is_refused(unknown: int) -> bool:
    _, weight_VD, ids_T = inputs(17, torch.float32)
    ids_T[3] = unknown
    weight_vD, rows = own(weight_VD)
    try:  # with no group, so that the rank which refuses leaves nobody waiting
        vocab_parallel_autograd.lookup(ids_T, weight_vD, dataclasses.replace(rows, group=None))
    except IndexError:
        return True
    return False


@pytest.mark.parametrize(("unknown", "refusing"), [(17, 2), (-1, 0)])
def test_an_id_outside_the_vocabulary_is_refused(unknown: int, refusing: int) -> None:
    assert run_ranks(is_refused, 3, unknown) == [rank == refusing for rank in range(3)]


def is_target_refused(unknown: int) -> bool:
    hidden_TD, weight_VD, targets_T = inputs(17, torch.float32)
    targets_T[2:] = -100
    targets_T[3] = unknown
    weight_vD, rows = own(weight_VD)
    try:  # with no group, as above
        vocab_parallel_loss.cross_entropy(hidden_TD, weight_vD, targets_T, dataclasses.replace(rows, group=None))
    except RuntimeError as error:
        return "out of bounds" in str(error)
    return False


@pytest.mark.parametrize(("unknown", "refusing"), [(17, 2), (-1, 0), (-100, None)])
def test_a_target_outside_the_vocabulary_is_refused(unknown: int, refusing: int | None) -> None:
    assert run_ranks(is_target_refused, 3, unknown) == [rank == refusing for rank in range(3)]
