"""Ranks that calibrate together: the same checkpoint twice on as many ranks, and all but the same on one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from qsharded import quantize
from qsharded.calibration.adapters import start_from_residual
from qsharded.calibration.method import Calibration
from qsharded.calibration.rows import read_calibration_rows
from qsharded.checkpoint.load import Outline
from qsharded.data import Tokenizer
from qsharded.nn import LoRAConfig
from qsharded.quant.experts import PackedExpertWeights
from qsharded.quant.formats import NF4_64
from qsharded.utils import collectives
from tests.calibration.mixtures import random_experts, rounding, tokens
from tests.checkpoints import write_chat_checkpoint, write_chat_rows
from tests.distributed.harness import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose 80 rows of k_proj and v_proj, and five rows of calibration, ranks share unevenly."""
    folder = tmp_path_factory.mktemp("model")
    model = write_chat_checkpoint(folder, hidden_size=320, num_attention_heads=4, num_key_value_heads=1)
    return model, write_chat_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60)


def command(model: Path, rows: Path, output: Path) -> None:
    flags = ["--calibrate", str(rows), "--calibrate-rows", "5", "--calibrate-length", "70"]
    quantize.main(["--model", str(model), "--output", str(output), *flags])


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_two_ranks_write_the_same_bytes_again_and_weights_as_good_as_ones(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    model, rows = made
    outputs = [tmp_path / name for name in ("two", "again", "one")]
    for output in outputs[:2]:
        run_ranks(command, 2, model, rows, output)
    command(model, rows, outputs[2])
    two, again, one = map(tensors, outputs)
    for name, tensor in two.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), again[name].flatten().view(torch.uint8)), name
    # Sums of moments in another order move a weight past a midpoint now and then, and with it what follows in its row;
    # a layer that sees other inputs for it is another in more places, so the first alone is compared.
    first = [name for name in two if ".layers.0." in name and name.endswith("_absmax")]
    assert len(first) == 7
    for name in first:
        codes = name.removesuffix("_absmax")
        assert (two[codes] == one[codes]).double().mean() > 0.95, codes
        assert (two[name] == one[name]).double().mean() > 0.95, name
    assert {path.name for path in tmp_path.iterdir()} == {"two", "again", "one"}


def start(model: Path, rows: Path, is_sharded: bool) -> dict[str, Any]:
    outline = Outline.of(model, LoRAConfig(r=4), torch.float32, random_init=False)
    vocabulary = outline.model.config.vocab_size
    calibration = read_calibration_rows([str(rows)], Tokenizer.from_folder(model), 5, 70, vocabulary)
    group = torch.distributed.group.WORLD if is_sharded else None
    return start_from_residual(outline.model, None, model, calibration, CPU, torch.float32, seed=0, group=group)


def experts(group: dist.ProcessGroup | None) -> tuple[dict[str, PackedExpertWeights], dict[str, int]]:
    """Of a layer, each rank with every other token of each; over two the last is left to both."""
    rank, ranks = collectives.rank(group), collectives.size(group)
    own = [x[rank::ranks] for x in tokens([300, 200, 40, 2, 1])]
    made = rounding(random_experts(5), own, Calibration("compensated", NF4_64, group))
    return made.weights(), dict(made.counts)


def adapters_and_experts(model: Path, rows: Path) -> Any:
    return start(model, rows, True), experts(dist.group.WORLD), experts(dist.group.WORLD)


@pytest.fixture(scope="module")
def of_two_ranks(made: tuple[Path, Path]) -> list[Any]:
    return run_ranks(adapters_and_experts, 2, *made)


def test_ranks_share_the_experts_of_a_layer(of_two_ranks: list[Any]) -> None:
    (_, two, again), (_, others, _) = of_two_ranks
    one = experts(None)
    assert two[1] == others[1] == one[1] == {"all": 5, "gate and up by search": 0, "down by search": 2}
    assert others[0] == {}
    assert two[0].keys() == one[0].keys()
    for name, packed in two[0].items():
        for found, same, expected in zip(
            packed.tensors[:2], again[0][name].tensors, one[0][name].tensors, strict=False
        ):
            assert torch.equal(found, same), name
            for e in range(5):
                assert (found[e] == expected[e]).double().mean() > 0.95, (name, e)


def test_adapters_begin_alike_on_every_rank(made: tuple[Path, Path], of_two_ranks: list[Any]) -> None:
    first, second = (of_rank[0] for of_rank in of_two_ranks)
    alone = start(*made, False)
    assert first.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    names = [name.removesuffix(".lora_A.weight") for name in alone if name.endswith(".lora_A.weight")]
    for name in names:  # singular vectors may turn; their product may not
        found, expected = (of[f"{name}.lora_B.weight"] @ of[f"{name}.lora_A.weight"] for of in (first, alone))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * expected.abs().max().item())


@pytest.mark.slow
def test_fewer_rows_than_ranks_are_refused_on_every_rank(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = made
    flags = ["--calibrate", str(rows), "--calibrate-rows", "1", "--calibrate-length", "70"]
    ends = run_ranks(ended, 2, ["--model", str(model), "--output", str(tmp_path / "out"), *flags])
    assert ends == [1, 1]


def ended(flags: list[str]) -> Any:
    with pytest.raises(SystemExit) as end:
        quantize.main(flags)
    return end.value.code
