"""A layer on one more token computes what it is written as, with few launches between its products."""

import pytest
import torch

from qsharded.fused import one_token
from qsharded.fused.layer import beyond_fused
from tests.models.parity import ids, load
from tests.models.variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_composition(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(variant).eval()
    calls, forward = [], one_token.forward
    monkeypatch.setattr(one_token, "forward", lambda *values: calls.append(1) or forward(*values))

    def logits() -> torch.Tensor:
        cache = model.new_cache(16)
        with torch.no_grad():
            model(ids()[:2, :13], cache=cache)
            return torch.cat([model(ids()[:2, at : at + 1], cache=cache) for at in (13, 14)], dim=1)

    by_units = logits()
    # beyond its original length Ministral 3 scales q, which is left to the composition
    scales = "ministral3" in variant or "mistral3" in variant
    if not scales:
        assert len(calls) == (0 if beyond_fused(model.config) else 2 * model.config.num_hidden_layers)
    monkeypatch.setattr(one_token, "takes", lambda *values: False)
    torch.testing.assert_close(by_units, logits(), atol=1e-5, rtol=1e-5)
