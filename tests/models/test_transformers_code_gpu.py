"""Models that transformers' code computes on a GPU: documents by their boundaries, without a mask."""

from pathlib import Path

import pytest
import torch

from qsharded.checkpoint import load_model
from qsharded.models.transformers_code.leaks import leaks
from tests.models.architectures import LORA, batch_of, computed_by, documents, gradients, write_architecture

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model_type", ["cohere2", "gemma3_text", "starcoder2", "nanochat"])
def test_packed_rows_are_those_of_the_cpu_within_bf16(tmp_path: Path, model_type: str) -> None:
    folder, batch, computed = write_architecture(tmp_path, model_type), batch_of(documents(packed=True)), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = load_model(folder, lora=LORA, dtype=dtype, device=device, model_code="transformers")
        _, loss = computed_by(model, batch.to(device))
        computed.append((loss.cpu(), {name: grad.float().cpu() for name, grad in gradients(model).items()}))
        assert not leaks(model)
    (expected, expected_grads), (found, grads) = computed
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)  # bf16 has three digits
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 0.1 * grad.abs().max(), name
