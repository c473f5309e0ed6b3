"""What the commands share: how mistakes are told, what "auto" means, and which block sizes there are."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from qsharded.config.options import Check
from qsharded.distributed.world import World, start_world
from qsharded.quant.formats import BLOCK_SIZES
from qsharded.utils import signals
from qsharded.utils.closed_output import end_quietly

BLOCK_SIZE = Check("one of " + ", ".join(map(str, BLOCK_SIZES)), lambda value: value in BLOCK_SIZES)
_MAIN_FIRST_S = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; "auto" is bfloat16 on a GPU, float32 on the CPU, which lacks fast bf16 products."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


@contextmanager
def errors_named(prog: str, world: World, kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turn errors of these kinds (a user's mistakes) into one line and exit status 1, instead of
    a traceback from every rank; of a mistake that all ranks find, the main rank tells."""
    try:
        yield
    except kinds as error:
        if isinstance(error, BrokenPipeError):
            end_quietly()
        rank = "" if world.is_main else f" (rank {world.rank})"
        if _is_first_to_tell(world):
            print(f"{prog}: error{rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _is_first_to_tell(world: World) -> bool:
    """Whether no other rank has told of a failure, most likely the same. The others give the main rank the time to."""
    if world.size == 1:
        return True
    if world.is_main:
        signals.tell_ranks(signals.failed(1))
        return True
    time.sleep(_MAIN_FIRST_S)
    return not signals.another_left()


def join_world(prog: str, timeout: timedelta | None = None) -> World:
    """:func:`~qsharded.distributed.world.start_world`, with a line and exit status 1 where this process cannot join."""
    unjoined = World(int(os.environ.get("RANK", 0)), 1, torch.device("cpu"), None)
    with errors_named(prog, unjoined, (ValueError, OSError)):
        try:
            return start_world(timeout)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]  # the stack of PyTorch's C++ follows
            raise ValueError(f"cannot join the other ranks: {reason}; python -m qsharded.doctor looks why") from None


def run_as_process(main: Callable[[], None]) -> None:
    """Run a command as this process.

    Ranks leave without the interpreter's shutdown, once what they print is flushed: threads of PyTorch's communication
    can still be alive then, and now and again abort the process ("terminate called without an active exception"),
    which torchrun would report as a failed run; and a rank that fails alone must not wait there for the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return main()
    status = _status_of(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status_of(main: Callable[[], None]) -> int:
    """What the command's process is to exit with. An error that is none of a user's is printed with its traceback."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
