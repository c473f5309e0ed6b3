"""Every family and variant sharded over two ranks, against transformers and PEFT on one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qsharded.distributed.choose_layout import Layout
from qsharded.utils.checkpointing_modes import Mode
from tests.distributed.harness import run_ranks
from tests.models.parity import Result, assert_close, case, load_folders, results
from tests.models.variants import VARIANTS

# Their vocabulary is cut by rows: with and without soft-caps, multipliers, tied heads. The others' is gathered.
CUT = {"gemma2", "gemma3_text-v4", "granite", "phi3-longrope", "mistral3", "llama"}
# The layers of mixtures are fused up to the mixture in every mode; those of all others, here, are computed again.
MODES: dict[str, Mode] = {"qwen3_moe": "none", "gpt_oss": "selective", "mixtral": "offloaded"}
ON_HOST = {"glm4_moe"}


def of_rank(folders: list[tuple[Path, Path]], layouts: list[Layout], modes: list[Mode]) -> list[Result]:
    """Each variant's, for this rank's row."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    made = []
    for (checkpoint, adapter), layout, mode in zip(folders, layouts, modes, strict=True):
        model = load_folders(checkpoint, adapter, mesh=mesh, layout=layout, activation_checkpointing=mode)
        made.append(results(model, slice(rank, rank + 1), world_size=2))
    return made


@pytest.fixture(scope="module")
def found() -> dict[str, list[Result]]:
    """Each variant's results on both ranks."""
    folders = [(case(variant).checkpoint, case(variant).adapter) for variant in VARIANTS]
    layouts = [Layout(vocab_parallel=variant in CUT, on_host=variant in ON_HOST) for variant in VARIANTS]
    ranks = run_ranks(of_rank, 2, folders, layouts, [MODES.get(variant, "full") for variant in VARIANTS])
    return dict(zip(VARIANTS, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_compute_what_peft_computes(variant: str, found: dict[str, list[Result]]) -> None:
    first, second = found[variant]
    together = {
        **first,
        "logits": torch.cat((first["logits"], second["logits"])),
        "loss": first["loss"] + second["loss"],
    }
    assert_close(together, case(variant).expected)
    for name in first.keys() - {"logits", "loss"}:
        assert torch.equal(first[name], second[name]), name
