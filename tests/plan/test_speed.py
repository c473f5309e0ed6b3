"""The estimate of tokens a second, against the recorded runs on H200s and against arithmetic."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import qsharded
from benchmarks.gpu_training import SHAPES
from benchmarks.two_gpus.large import LARGE, Large
from qsharded.cli.base_model import lora_config
from qsharded.config import TrainConfig
from qsharded.models import ModelConfig
from qsharded.plan.gpu_memory import Planner
from qsharded.plan.speed import Speed, estimate, tokens_of_a_step
from qsharded.utils.cards import CARDS, card_called

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "two_gpus.json"
RECORDED = {
    line["name"]: line["came"]["tokens_per_second_a_gpu"]
    for line in json.loads(RECORD.read_text(encoding="utf-8"))["lines"]
    if "tokens_per_second_a_gpu" in line["came"]
}
RUNS = {run.name: run for run in LARGE}


def settings(run: Large) -> TrainConfig:
    given = {"activation_checkpointing": "full"} | run.options
    return TrainConfig(
        model="m",
        dataset="d",
        max_length=run.length,
        per_device_train_batch_size=run.rows,
        gradient_accumulation_steps=run.accumulation,
        **given,
    )


@cache
def planner(run: str) -> Planner:
    config = TrainConfig(model="m", dataset="d")
    return Planner(ModelConfig.from_hf(RUNS[run].shape), lora_config(config, None), torch.bfloat16)


def estimated(run: Large, card: str = "H200", **changed: object) -> Speed:
    one = planner(run.name)
    return estimate(one.model, one.plan(replace(settings(run), **changed), run.ranks), CARDS[card])


def test_there_are_recorded_runs_of_every_size() -> None:
    sizes = {RUNS[name].shape["hidden_size"] for name in RECORDED}
    assert sizes >= {SHAPES[name]["hidden_size"] for name in ("llama3-8b", "llama3-70b", "llama3-405b")}
    assert json.loads(RECORD.read_text(encoding="utf-8"))["gpu"] == "NVIDIA H200"


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run_is_met_within_a_quarter(name: str) -> None:
    run = RUNS[name]
    assert estimated(run).tokens_per_second / run.ranks == pytest.approx(RECORDED[name], rel=0.25)


def test_what_takes_longer_is_slower() -> None:
    run = RUNS["8b-one-gpu"]
    speed = estimated(run).tokens_per_second
    assert estimated(run, activation_checkpointing="none").tokens_per_second > 1.2 * speed  # a third more products
    assert estimated(run, max_length=32768, per_device_train_batch_size=1).tokens_per_second < 0.8 * speed
    assert estimated(run, "A100-80GB").tokens_per_second < speed / 2.5
    assert estimated(run, activation_checkpointing="offloaded").tokens_per_second < speed


def test_launching_kernels_bounds_a_small_model() -> None:
    steps = json.loads(RECORD.with_name("train_step.json").read_text(encoding="utf-8"))["rows"]
    fewest = min(row["kernels"] for row in steps if row["who"] == "qsharded")  # of the 32 layers of llama3-8b
    shape = json.loads((Path(qsharded.__file__).parent / "builtin" / "model" / "config.json").read_text())
    config = TrainConfig(model="m", dataset="d", max_length=128, activation_checkpointing="full")
    one = Planner(ModelConfig.from_hf(shape), lora_config(config, None), torch.bfloat16)
    speed = estimate(one.model, one.plan(config, 1), CARDS["H200"])
    assert speed.step_s == pytest.approx(
        config.gradient_accumulation_steps * shape["num_hidden_layers"] * fewest / 32 * 5e-6, rel=0.02
    )


def test_weights_that_come_over_a_slow_link_bound_the_speed() -> None:
    run = RUNS["70b-2x2048"]
    short = estimated(run, "L40S", max_length=64)
    # half of 68 billion weights at 4.127 bits, in three passes, at the link's share of 25 GB/s; two micro-batches
    half = 68.45e9 * 4.127 / 8 / 2
    assert short.step_s == pytest.approx(2 * 3 * half / (25e9 * 0.7), rel=0.02)
    hosted = estimated(run, "L40S", max_length=64, cpu_offload=True)
    assert hosted.step_s == pytest.approx(2 * short.step_s, rel=0.02)


def test_tokens_of_a_step_are_those_of_all_ranks() -> None:
    run = RUNS["70b-2x2048"]
    assert tokens_of_a_step(planner(run.name).plan(settings(run), 2)) == 2 * 2 * 2048 * 2


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla T4", None),
    ],
)
def test_cuda_names_lead_to_cards(name: str, card: str | None) -> None:
    assert card_called(name) is (CARDS[card] if card else None)


STEPS = json.loads((RECORD.parent / "train_step.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize(
    ("case", "rows", "length", "mode"),
    [
        ("4x2048 none", 4, 2048, "none"),
        ("4x2048 full", 4, 2048, "full"),
        ("4x2048 offloaded", 4, 2048, "offloaded"),
        ("1x8192 full", 1, 8192, "full"),
        ("4x512 full", 4, 512, "full"),
    ],
)
def test_recorded_steps_in_other_modes_and_lengths_are_met_too(case: str, rows: int, length: int, mode: str) -> None:
    """Not "4x512 none": one of its three records is 32% slower than the estimate, as its host launched too slowly."""
    recorded = [row["tokens_per_second"] for row in STEPS if row["case"] == case and row["who"] == "qsharded"]
    changed = {"per_device_train_batch_size": rows, "max_length": length, "activation_checkpointing": mode}
    assert recorded
    for speed in recorded:
        assert estimated(RUNS["8b-one-gpu"], **changed).tokens_per_second == pytest.approx(speed, rel=0.25)
