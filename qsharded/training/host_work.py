"""Less work for the host between the kernels of a step: at short rows it is the host that a GPU waits for."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def little_host_work() -> Iterator[None]:
    """Steps run faster in here.

    The garbage collector leaves out what is there already: model, modules and libraries are a million objects, which it
    would go through every few steps, for 20 ms or more. Backward runs in the calling thread, as on CPUs, instead of
    handing the interpreter's lock to a thread for each device.
    """
    gc.collect()
    gc.freeze()
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        gc.unfreeze()
