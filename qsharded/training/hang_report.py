"""What is left behind of a run that hangs: the stacks of this rank, NCCL's flight record, and a line on the ranks."""

import faulthandler
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

import qsharded

FOLDER = "hang"
_OWN_CODE = str(Path(qsharded.__file__).parent) + os.sep
_LISTED = 8  # ranks that the line has room for


@dataclass(frozen=True)
class RankStatus:
    """What a rank says of itself.

    Attributes:
        posts: how often it has said something; that of a rank which does not answer stands still.
        beats, meetings, where: of its heartbeat.
        frame: where its main thread is in the code.
    """

    posts: int
    beats: int
    meetings: int
    where: str
    frame: str


def main_frame() -> str:
    """Where the main thread is: the innermost function of ours, with its line, and what it has called."""
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    own: FrameType | None = innermost
    while own is not None and not own.f_code.co_filename.startswith(_OWN_CODE):
        own = own.f_back
    place = _place(innermost)
    return place if own in (None, innermost) else f"{_place(own)} > {place}"


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "?"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def write_stacks(output_dir: Path, rank: int) -> Path:
    """Write the stacks of this rank's threads, and what NCCL recorded of its last collectives, into ``output_dir``;
    returns the folder."""
    folder = output_dir / FOLDER
    with suppress(OSError):  # a disk that hangs with the run is no reason to stay
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        if record := _nccl_record():
            (folder / f"nccl-rank-{rank:05d}.pickle").write_bytes(record)
    return folder


def _nccl_record() -> bytes:
    """The pickle that PyTorch's ``torchfrtrace`` reads; empty where NCCL is not used."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    try:
        return dump() if dump and torch.cuda.is_available() else b""
    except RuntimeError:
        return b""


def said_of(ranks: Mapping[int, RankStatus], silent: set[int]) -> str:
    """Which ranks do not answer (``silent``, with what they said last), which are behind, and where the others are."""
    answering = {rank: status for rank, status in ranks.items() if rank not in silent}
    ahead = max((status.meetings for status in answering.values()), default=0)
    behind = {rank for rank, status in answering.items() if status.meetings < ahead}
    lines = [f"rank {rank} does not answer (last: {_last(ranks.get(rank))})" for rank in sorted(silent)]
    lines += [f"rank {rank} is behind, {_at(answering[rank])}" for rank in sorted(behind)]
    lines += [f"rank {rank} waits, {_at(answering[rank])}" for rank in sorted(answering.keys() - behind)]
    more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "; ".join(lines[:_LISTED]) + more


def _last(status: RankStatus | None) -> str:
    return status.where if status else "nothing"


def _at(status: RankStatus) -> str:
    return f"{status.where}, in {status.frame}"
