"""What a run's steps spare the host, and that it is given back afterwards."""

import gc
import threading

import pytest
import torch

from qsharded.training.host_work import little_host_work


def test_what_was_there_before_is_left_out_of_collections_until_the_end() -> None:
    before, found = gc.get_freeze_count(), []

    def fail() -> None:
        with little_host_work():
            found.append(gc.get_freeze_count())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found[0] > before + 10_000
    assert gc.get_freeze_count() == 0
    assert torch.autograd.is_multithreading_enabled()


def test_backward_runs_in_the_calling_thread() -> None:
    with little_host_work():
        assert not torch.autograd.is_multithreading_enabled()
        threads = []
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda grad: threads.append(threading.get_ident()))
        x.sum().backward()
    assert threads == [threading.get_ident()]
