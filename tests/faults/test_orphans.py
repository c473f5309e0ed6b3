"""torchrun is killed: its ranks must not train on, for whoever restarts the run shares their folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

RANK = """
import time
from qsharded.utils import signals
signals._LOOK_S = 0.1
signals.take_over("qsharded.train")
print("ready", flush=True)
time.sleep({seconds})
"""
# Starts a rank and is gone once that is ready.
LAUNCHER = """
import os, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
assert rank.stdout.readline() == b"ready\\n"
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("elastic", [True, False])
def test_a_rank_leaves_when_torchrun_is_gone_and_no_other_process_does(tmp_path: Path, elastic: bool) -> None:
    environment = os.environ | ({"TORCHELASTIC_RUN_ID": "x"} if elastic else {})
    environment.pop("" if elastic else "TORCHELASTIC_RUN_ID", None)
    said = tmp_path / "said"
    rank = RANK.format(seconds=60 if elastic else 1) + f"open({str(said)!r}, 'w').write('alive')\n"
    # its end is seen where both streams are closed, which the rank shares
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCHER, rank], stderr=subprocess.PIPE, cwd=ROOT, env=environment, timeout=30, text=True
    )
    gone = "which started this rank, is gone: leaving at once"
    assert (gone in ended.stderr, said.exists()) == ((True, False) if elastic else (False, True))
