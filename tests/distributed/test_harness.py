"""What the tests of several ranks rely on."""

import socket

import pytest
import torch.distributed as dist

from tests.distributed import harness


def test_ranks_that_do_not_meet_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = iter([other.getsockname()[1], harness.free_port()])
        monkeypatch.setattr(harness, "free_port", lambda: next(ports))
        assert harness.run_ranks(dist.get_rank, 2) == [0, 1]
    assert next(ports, None) is None


def test_a_rank_that_fails_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = iter([harness.free_port()])
    monkeypatch.setattr(harness, "free_port", lambda: next(ports))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        harness.run_ranks(divmod, 1, 1, 0)
