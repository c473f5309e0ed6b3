"""Rows packed with several documents: each must be as if it stood alone."""

import pytest
import torch
from torch import Tensor

from .families import VOCAB, gradients, pair, random_ids

FAMILIES = ["llama3", "mistral-window", "qwen3-layer-types"]
LENGTHS = (11, 17, 6)
PADDING = 4


def packed_row() -> dict[str, Tensor]:
    """One row `[1, S]` of three documents and padding."""
    length = sum(LENGTHS)
    return {
        "input_ids_BS": torch.cat((random_ids(1, length), torch.zeros(1, PADDING, dtype=torch.int64)), dim=1),
        "positions_BS": torch.cat([torch.arange(n) for n in LENGTHS] + [torch.zeros(PADDING, dtype=torch.int64)])[None],
        "document_ids_BS": torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)] + [-1] * PADDING)[None],
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changed", [0, 1, 2, -1])
def test_changing_a_document_leaves_the_others_bit_equal(family: str, changed: int) -> None:
    model = pair(family)[1]
    row = packed_row()
    inside = row["document_ids_BS"] == changed
    other_ids = row["input_ids_BS"].where(~inside, (row["input_ids_BS"] + 1) % VOCAB)
    with torch.no_grad():
        before, after = model(**row), model(**(row | {"input_ids_BS": other_ids}))
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.isclose(before[inside], after[inside], atol=1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_give_the_logits_they_give_alone(family: str) -> None:
    model = pair(family)[1]
    row = packed_row()
    with torch.no_grad():
        packed = model(**row)[:, :-PADDING]
        alone = [model(ids) for ids in row["input_ids_BS"][:, :-PADDING].split(LENGTHS, dim=1)]
    # Other kernels and orders of summation, fp32, logits up to about 10.
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_leaves_loss_and_gradients_as_they_are(family: str) -> None:
    model = pair(family)[1]
    row = packed_row()
    targets = random_ids(1, sum(LENGTHS) + PADDING, seed=1).masked_fill(row["document_ids_BS"] == -1, -100)
    model(**row, targets_BS=targets).backward()
    packed = gradients(model)
    columns = [t[:, :-PADDING].split(LENGTHS, dim=1) for t in (row["input_ids_BS"], targets)]
    for ids, target in zip(*columns, strict=True):
        model(ids, targets_BS=target).backward()
    alone = gradients(model)
    for name, gradient in packed.items():
        scale = alone[name].abs().max().item()
        torch.testing.assert_close(gradient, alone[name], atol=1e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_nothing_but_padding_stay_finite(family: str) -> None:
    model = pair(family)[1]
    row = {name: torch.cat((value, torch.zeros_like(value))) for name, value in packed_row().items()}
    row["document_ids_BS"][1] = -1
    targets = torch.cat((random_ids(1, 38, seed=1), torch.full((1, 38), -100)))
    logits = model(**row)
    model(**row, targets_BS=targets).backward()
    assert logits.isfinite().all()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name


def test_a_batch_without_trained_tokens_has_zero_loss_and_gradients() -> None:
    model = pair("llama2")[1]
    row = {name: torch.zeros(2, 8, dtype=torch.int64) for name in packed_row()} | {
        "document_ids_BS": torch.full((2, 8), -1)
    }
    loss = model(**row, targets_BS=torch.full((2, 8), -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())
