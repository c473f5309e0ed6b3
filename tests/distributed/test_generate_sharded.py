"""The generate command on several ranks says what it says on one."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint.adapter import save_adapter, trainable
from qsharded.checkpoint.load import load_model
from qsharded.distributed.world import World
from qsharded.generate import GenerateConfig, main, run
from qsharded.nn import LoRAConfig
from tests.checkpoints import write_checkpoint
from tests.data.folders import make_folder
from tests.data.templates import CHATML
from tests.distributed.harness import run_ranks

PROMPTS = ("What is 2+2?", "世界")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose 3 x 64 columns divide unevenly, with a chat tokenizer and, in adapter/, an adapter."""
    folder = make_folder(tmp_path_factory.mktemp("llama"), template=CHATML)
    write_checkpoint(folder, hidden_size=192, intermediate_size=320, vocab_size=449, shards=2)
    config = LoRAConfig(r=3, modules_to_save=["lm_head"])
    model = load_model(folder, lora=config, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    for _, parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, config, folder / "adapter", base_model=str(folder))
    return folder


SETTINGS = (("float32", 0.0), ("bfloat16", 0.0), ("float32", 2.0))


def printed(folder: Path, world_size: int) -> list[str]:
    """What this rank prints under each of the settings."""
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    world = World(dist.get_rank(), world_size, torch.device("cpu"), mesh)
    adapter = str(folder / "adapter")
    shown = []
    for dtype, temperature in SETTINGS:
        flags = {"dtype": dtype, "temperature": temperature, "prompt": PROMPTS, "max_new_tokens": 8}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run(GenerateConfig(model=str(folder), adapter=adapter, **flags), world)
        shown.append(out.getvalue())
    return shown


def test_ranks_say_what_one_says_and_the_first_prints(folder: Path) -> None:
    alone = run_ranks(printed, 1, folder, 1)[0]
    assert len(set(alone)) > 1
    assert all(len(text) > len("> What is 2+2?\n> 世界\n") + 8 for text in alone)
    assert run_ranks(printed, 2, folder, 2) == [alone, [""] * len(SETTINGS)]


def test_under_torchrun_the_prompt_may_come_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--adapter", str(folder / "adapter"), "--max-new-tokens", "16", "--dtype", "float32"]
    main([*flags, "--prompt", PROMPTS[1]])
    alone = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "qsharded.generate", *flags, "--prompt", "-"]
    without_gpus = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # two ranks need two
    sharded = subprocess.run(command, input=f"{PROMPTS[1]}\n".encode(), env=without_gpus, capture_output=True)
    assert sharded.returncode == 0, sharded.stderr.decode()
    assert alone.strip()
    assert sharded.stdout.decode() == alone
