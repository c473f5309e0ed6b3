"""The balance loss of a mixture's experts, against transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded.checkpoint import load_model
from qsharded.data import Batch
from qsharded.models.balance import BalanceTally
from qsharded.nn import LoRAConfig
from qsharded.training.balanced import BalancedFineTuning
from qsharded.utils import collectives
from tests.models.parity import Case, case, ids, load, round_to_nf4

COEFFICIENT = 0.3


def batch(padded: int, knows_documents: bool = True) -> Batch:
    """Two rows, of which the first ends in padding."""
    rows = ids()
    documents = torch.arange(2)[:, None].expand(rows.shape).clone()
    targets = torch.cat((rows[:, 1:], torch.full_like(rows[:, :1], -100)), dim=1)
    if padded:
        documents[0, -padded:] = -1
        targets[0, -padded - 1 :] = -100
    positions = torch.arange(rows.shape[1]).where(documents >= 0, 0)
    return Batch(rows, targets, positions, documents if knows_documents else None, None)


def theirs(of: Case, variant: str, padded: int) -> tuple[Tensor, Tensor]:
    """transformers' loss on the same packed weights, and its gradient by the first layer's q_proj."""
    model = AutoModelForCausalLM.from_pretrained(of.checkpoint, dtype=torch.float32, attn_implementation="eager")
    model = round_to_nf4(model).eval()
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = COEFFICIENT
    mask = (batch(padded).document_ids >= 0).long()
    labels = ids().masked_fill(mask == 0, -100)
    out = model(input_ids=ids(), attention_mask=mask, labels=labels, output_router_logits=True)
    out.loss.backward()
    return out.loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(("padded", "knows_documents"), [(0, True), (6, True), (6, False)])
@pytest.mark.parametrize("variant", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_transformers(
    variant: str, padded: int, knows_documents: bool, checkpointing: Any
) -> None:
    of = case(variant)
    lora = LoRAConfig(r=64, lora_alpha=64, target_modules=["q_proj"])
    model = load_model(
        of.checkpoint, lora=lora, dtype=torch.float32, device="cpu", activation_checkpointing=checkpointing
    )
    q_proj = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q_proj.lora_A.weight.copy_(torch.eye(64))  # B's gradient is then that of the weight
    sums = BalancedFineTuning(COEFFICIENT)(model, batch(padded, knows_documents))
    count = int((batch(padded).targets != -100).sum())
    (sums.loss / count).backward()
    loss, grad = theirs(of, variant, padded)
    torch.testing.assert_close(sums.loss.detach() / count, loss, rtol=1e-5, atol=0)
    assert (q_proj.lora_B.weight.grad - grad).abs().max() <= 2e-5 * grad.abs().max()


def test_two_ranks_make_the_loss_of_one_that_has_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of choices and probabilities is no sum over ranks: choices are added first."""
    model, objective, of_all = load("qwen3_moe"), BalancedFineTuning(COEFFICIENT), list[Tensor]()
    whole = batch(6)
    rows = [Batch(*(part[n : n + 1] for part in parts_of(whole))) for n in range(2)]
    monkeypatch.setattr(collectives, "all_reduce", lambda tensor, *_: of_all.append(tensor.clone()))
    alone = [objective(model, row).loss for row in rows]
    monkeypatch.setattr(collectives, "all_reduce", lambda tensor, *_: tensor.copy_(of_all[0] + of_all[1]))
    together = sum(objective(model, row).loss for row in rows)
    monkeypatch.undo()
    torch.testing.assert_close(together, objective(model, whole).loss, rtol=1e-6, atol=0)
    assert (sum(alone) - together).abs() > 1e-4 * together


def parts_of(whole: Batch) -> tuple[Tensor, ...]:
    assert whole.document_ids is not None
    return whole.input_ids, whole.targets, whole.positions, whole.document_ids


def test_models_without_such_a_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="there is none"):
        BalanceTally.of(load("qwen3"))
    with pytest.raises(ValueError, match="correction bias balances its experts"):
        BalanceTally.of(load("glm4_moe"))
