"""The step benchmark's own logic, and that it runs through a small case; figures are taken on a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_training import SHAPES
from benchmarks.train_step import plot
from benchmarks.train_step.__main__ import figures, run
from benchmarks.train_step.case import PEAK_BF16_FLOPS, Case, suite
from benchmarks.train_step.gpu_activity import phase_of, union
from benchmarks.train_step.ours import checkpointing, random_batch
from qsharded.fused.layer import beyond_fused
from qsharded.models import ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.utils.checkpointing_modes import KEEP_ALL
from tests.checkpoints import LLAMA

SMALL = Case("small", LLAMA, rows=2, length=16, documents=3, steps=1)


def test_a_small_case_runs_through() -> None:
    measured = run("qsharded", SMALL, "")
    assert measured["step_ms"] >= measured["host_ms"] > 0, measured
    row = figures(SMALL, measured)
    assert row["tokens_per_second"] == pytest.approx(32 / measured["step_ms"] * 1e3)
    assert 0 < row["mfu"] == pytest.approx(SMALL.flops() / (measured["step_ms"] / 1e3) / PEAK_BF16_FLOPS)


def test_rows_of_ever_other_lengths_run_through() -> None:
    ragged = Case("ragged", LLAMA, rows=2, length=24, shortest=3, steps=30)
    lengths = ragged.lengths()
    assert len(lengths) == 30
    assert len(set(lengths)) > 9
    measured = run("qsharded", ragged, "")
    tokens = [2 * length for length in (lengths + lengths[:3])[20:]]
    assert measured["tokens"] == pytest.approx(sum(tokens) / len(tokens))
    assert "mfu" not in figures(ragged, measured)


def test_auto_is_the_trainers_choice_for_that_memory() -> None:
    shape = LLAMA | {"num_hidden_layers": 4}
    case = Case("auto", shape, length=512, checkpointing="auto", memory_gib=1000)
    assert checkpointing(case, LoRAConfig()) == KEEP_ALL
    assert checkpointing(replace(case, memory_gib=0.7), LoRAConfig()).mode == "full"


def test_a_peer_runs_through_a_small_case(tmp_path: Path) -> None:
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    assert run("transformers", Case("small", LLAMA, rows=2, length=16, steps=1), str(tmp_path)).get("step_ms", 0) > 0


def test_a_case_that_fails_says_why() -> None:
    failed = run("qsharded", Case("wrong", {**LLAMA, "model_type": "other"}), "")
    assert "model_type 'other' is not supported" in failed["failed"]
    assert figures(SMALL, failed) == failed


def test_rows_hold_their_documents() -> None:
    batch = random_batch(SMALL, 16)
    assert batch.document_ids is not None
    assert batch.document_ids.unique().tolist() == [0, 1, 2]
    assert batch.boundaries is not None
    assert len(batch.boundaries.starts) == 2 * 3 + 1
    starts = batch.positions == 0
    assert torch.equal(starts.flatten().nonzero()[:, 0].int(), batch.boundaries.starts[:-1])


def test_arithmetic_by_hand() -> None:
    shape = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    case = Case("by hand", LLAMA | shape, rows=3, length=10)
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16) + 8 * 32
    attention = 2 * 7 * 2 * (3 * 10 * 10 / 2) * 8  # 7 products in 2 layers, 2 operations a pair and dimension
    assert case.flops() == 4 * weights * 30 + attention


def test_a_window_leaves_out_the_pairs_beyond_it() -> None:
    shape = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
    pairs = 2 * 3 * (10 * 4 - 4 * 4 / 2)  # in 2 layers of 3 rows: 10 tokens see 4 keys, but for the first 4
    without = Case("all", LLAMA, rows=3, length=10).flops()
    per_pair = 2 * 7 * LLAMA["hidden_size"]
    assert Case("window", shape, rows=3, length=10).flops() == pytest.approx(
        without - per_pair * (2 * 3 * 10 * 10 / 2 - pairs)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_one_that_is_trained(name: str) -> None:
    assert Case(name, SHAPES[name]).flops() > 0
    assert beyond_fused(ModelConfig.from_hf(SHAPES[name])) is None


def test_overlapping_kernels_count_once() -> None:
    assert union([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7
    assert union([]) == 0


def test_kernels_have_their_phases() -> None:
    kernels = {
        "nvjet_sm90_tst_192x192": "products",
        "void pytorch_flash::flash_bwd": "attention",
        "dequantize_parts_kernel<true>": "dequantize",
        "ncclDevKernel_AllGather": "communication",
        "_forward_kernel": "element-wise and loss",
    }
    assert {name: phase_of(name) for name in kernels} == kernels


def test_the_suites_cases_have_names_of_their_own_and_are_drawn(tmp_path: Path) -> None:
    cases = suite(LLAMA)
    assert len({case.name for case in cases}) == len(cases)
    rows = [{"case": case.name, "who": who} for case in cases for who in ("qsharded", "unsloth")]
    rows = [row | {"tokens_per_second": 1000.0} for row in rows[:-1]] + [rows[-1] | {"failed": "no memory"}]
    record = {"shape": "s", "gpu": "g", "date": "2026-01-01", "versions": {"torch": "2", "triton": "3"}}
    plot.save(rows, tmp_path / "plot.png", plot.title(record))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    json.dumps([case.to_json() for case in cases])
