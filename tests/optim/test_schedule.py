"""Learning rates over a run."""

import math

import pytest

from qsharded.optim.schedule import learning_rate


def rates(kind: str, total: int = 20, warmup: int = 4) -> list[float]:
    return [
        learning_rate(step, peak=2.0, total_steps=total, warmup_steps=warmup, kind=kind) for step in range(total + 1)
    ]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rate_climbs_evenly_and_never_starts_at_zero(kind: str) -> None:
    assert rates(kind)[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_the_rate_falls_to_zero_or_stays() -> None:
    assert rates("cosine")[12] == pytest.approx(1.0)
    assert rates("cosine")[8] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates("linear")[12] == pytest.approx(1.0)
    assert rates("linear")[8] == pytest.approx(1.5)
    assert rates("cosine")[20] == rates("linear")[20] == 0
    assert set(rates("constant")[4:]) == {2.0}


def test_a_run_of_warmup_alone_and_an_unknown_kind() -> None:
    assert rates("cosine", total=4, warmup=4)[4] == 2.0
    with pytest.raises(ValueError, match="must be one of cosine, linear, constant, got 'step'"):
        rates("step")
