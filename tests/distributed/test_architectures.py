"""Architectures that transformers' code computes: on one rank and on two what transformers and PEFT compute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import load_adapter
from qsharded.models import CausalLM
from qsharded.utils.checkpointing_modes import Mode
from qsharded.utils.sharding import whole
from tests.distributed.harness import run_ranks
from tests.models.architecture_list import ARCHITECTURES, SLOW
from tests.models.architectures import (
    LORA,
    assert_parity,
    batch_of,
    computed_by,
    computed_by_peft,
    documents,
    gradients,
    packed_weights,
    write_architecture,
    write_random_adapter,
)

Computed = tuple[Tensor, Tensor, Mapping[str, Tensor]]


def loaded(folder: Path, mesh: Any = None) -> CausalLM:
    settings: dict[str, Any] = {"lora": LORA, "dtype": torch.float32, "model_code": "transformers"}
    mode: Mode = "none" if mesh is None else "full"
    return load_model(folder, mesh=mesh, activation_checkpointing=mode, **settings)


def rows_of(model_type: str) -> list[list[Tensor]]:
    return documents(packed=ARCHITECTURES[model_type].packs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Path]:
    root, left_out = tmp_path_factory.mktemp("architectures"), frozenset() if pytestconfig.getoption("--slow") else SLOW
    return {name: write_architecture(root / name, name) for name in ARCHITECTURES if name not in left_out}


@pytest.fixture(scope="module")
def of_one_rank(folders: dict[str, Path]) -> dict[str, Computed]:
    computed: dict[str, Computed] = {}
    for name, folder in folders.items():
        model = loaded(folder)
        write_random_adapter(model, folder / "adapter")
        logits, loss = computed_by(model, batch_of(rows_of(name)))
        computed[name] = logits, loss, gradients(model)
    return computed


@pytest.fixture(scope="module")
def of_peft(folders: dict[str, Path], of_one_rank: Any) -> dict[str, Computed]:
    return {
        name: computed_by_peft(folder, folder / "adapter", packed_weights(loaded(folder)), rows_of(name))
        for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def of_two_ranks(folders: dict[str, Path], of_one_rank: Any) -> list[dict[str, Computed]]:
    return run_ranks(sharded, 2, folders)


def sharded(folders: dict[str, Path]) -> dict[str, Computed]:
    """Each rank its row; the gradients are the sum of both."""
    mesh = init_device_mesh("cpu", (2,))
    computed: dict[str, Computed] = {}
    for name, folder in folders.items():
        model = loaded(folder, mesh)
        load_adapter(model, folder / "adapter")
        logits, loss = computed_by(model, batch_of([rows_of(name)[mesh.get_rank()]]))
        computed[name] = logits, loss, {n: whole(grad) * 2 for n, grad in gradients(model).items()}
    return computed


def test_one_rank_and_two_compute_what_transformers_and_peft_do(
    of_one_rank: dict[str, Computed], of_two_ranks: list[dict[str, Computed]], of_peft: dict[str, Computed]
) -> None:
    """In one test: workers that shared its cases would each build all models."""
    wrong: dict[str, str] = {}
    for name, expected in of_peft.items():
        first, second = (of_rank[name] for of_rank in of_two_ranks)
        joined = torch.cat((first[0], second[0])), first[1] + second[1], first[2]
        for ranks, found in {"one rank": of_one_rank[name], "two ranks": joined}.items():
            try:
                assert_same(found, expected)
            except AssertionError as error:
                wrong[f"{name}, {ranks}"] = str(error)
    assert not wrong
    assert len(of_peft) >= len(ARCHITECTURES) - len(SLOW)


def assert_same(found: Computed, expected: Computed) -> None:
    assert_parity(found[0], expected[0], "logits")
    assert_parity(found[1], expected[1], "loss")
    assert found[2].keys() == expected[2].keys() != set()
    for parameter, grad in expected[2].items():
        assert_parity(found[2][parameter], grad, parameter)
