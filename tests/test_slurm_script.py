"""The batch script in docs/multi-node.md, run by bash with Slurm's commands replaced."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Whoever runs it until it is told to stop, and what it then leaves.
STUBS = {
    "srun": 'trap "$AT_THE_END; exit 1" TERM; echo $$ >step.new; mv step.new step; while true; do sleep 0.05; done',
    "scancel": 'echo "$@" >>cancelled; kill -TERM "$(cat step)"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >>requeued; fi',
}


def scripts() -> list[str]:
    text = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
    return re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("text", scripts())
def test_a_script_is_one_that_bash_reads(text: str) -> None:
    assert subprocess.run(["bash", "-n"], input=text, text=True, stderr=subprocess.PIPE, check=False).stderr == ""


@pytest.mark.parametrize(("at_the_end", "requeued"), [("true", ["requeue 77\n"]), ("touch out/job/finished.json", [])])
def test_the_time_limit_stops_the_ranks_and_requeues_what_is_not_finished(
    tmp_path: Path, at_the_end: str, requeued: list[str]
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "out" / "job").mkdir(parents=True)
    for name, lines in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    (text,) = [text for text in scripts() if "#SBATCH" in text]
    script = tmp_path / "train.sh"
    script.write_text(text.replace("/shared/", f"{tmp_path}/out/"))
    variables = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "77", "JOB_NAME": "job", "JOB_NODELIST": "node[1-2]"}
    variables |= {"CPUS_PER_TASK": "8", "GPUS_ON_NODE": "2", "NNODES": "2"}
    environment = {f"SLURM_{name}": value for name, value in variables.items()}
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "AT_THE_END": at_the_end}
    job = subprocess.Popen(["bash", str(script)], env=environment)
    try:
        while not (tmp_path / "step").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 1  # torchrun's, by way of srun
    finally:
        job.kill()
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 77\n"
    assert [path.read_text() for path in tmp_path.glob("requeued")] == requeued
