from dataclasses import replace

import pytest
import torch

from qsharded.data import Batch, Example, make_batch
from qsharded.models import CausalLM, ModelConfig
from qsharded.models.attention_inputs import attention_mask
from qsharded.training.objective import batch_loss
from tests.checkpoints import LLAMA

A = Example([1, 2, 3], [False, False, True])
B = Example([4, 5], [True, True])
C = Example([6, 7, 8, 9], [False, True, False, True])


def test_rows_by_hand():
    batch = make_batch([[A, B], [C]], pad_id=99, max_length=8)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 99, 99, 99], [6, 7, 8, 9, 99, 99, 99, 99]]
    # Nothing is predicted across documents: 4 is not the target of 3, though it follows and is trained on.
    assert batch.targets.tolist() == [[-100, 3, -100, 5, -100, -100, -100, -100], [7, -100, 9] + [-100] * 5]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1], [0, 0, 0, 0, -1, -1, -1, -1]]
    assert {tensor.dtype for tensor in tensors(batch)} == {torch.int64}
    assert batch.boundaries.starts.tolist() == [0, 3, 5, 8, 12, 16]  # padding is one more document
    assert batch.boundaries.longest == 4


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.input_ids, batch.targets, batch.positions, batch.document_ids]


@pytest.mark.parametrize(
    ("lengths", "max_length", "width"),
    [((3,), 64, 32), ((32,), 64, 32), ((33, 3), 64, 64), ((9,), 10, 10), ((10,), 10, 10), ((3,), 4, 4)],
)
def test_width_is_a_multiple_of_32_or_the_maximum(lengths, max_length, width):
    rows = [[Example([1] * length, [True] * length)] for length in lengths]
    batch = make_batch(rows, pad_id=0, max_length=max_length)
    assert batch.input_ids.shape == (len(lengths), width)


def test_no_rows_make_one_row_of_padding():
    batch = make_batch([], pad_id=3, max_length=4)
    assert batch.input_ids.tolist() == [[3] * 4]
    assert batch.targets.tolist() == [[-100] * 4]
    assert batch.positions.tolist() == [[0] * 4]
    assert batch.document_ids is None


def test_rows_of_one_document_need_no_mask_and_have_the_same_loss():
    model = CausalLM(ModelConfig.from_hf(LLAMA), dtype=torch.float32)
    batch = make_batch([[A], [C], []], pad_id=0, max_length=8)
    assert attention_mask(8, 8, batch.document_ids, None, torch.device("cpu")) is None
    explicit = torch.tensor([[0] * 3 + [-1] * 5, [0] * 4 + [-1] * 4, [-1] * 8])
    masked = batch_loss(model, replace(batch, document_ids=explicit))
    assert masked > 0
    torch.testing.assert_close(batch_loss(model, batch), masked, rtol=1e-6, atol=0)


def test_moving():
    moved = make_batch([[A, B]], pad_id=0, max_length=8).to("meta")
    assert {tensor.device.type for tensor in [*tensors(moved), moved.boundaries.starts]} == {"meta"}
    assert make_batch([[A]], pad_id=0, max_length=8).to("meta").document_ids is None
