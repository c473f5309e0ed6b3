"""The kernel benchmark's own logic, on the CPU and without looking at a clock."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import ceilings, context, fused_rows, measure, peers, plots, report, shapes, timing
from benchmarks.kernels.case import Case, Contender, relative_error
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.ops import OPERATIONS
from benchmarks.kernels.timing import Times, in_turns, summary

CPU = torch.device("cpu")
LIMITS = Ceilings(copy=1e9, matmul=1e12)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing._FLUSHED_BYTES, "cpu", 1 << 10)
    monkeypatch.setitem(ceilings._COPIED_BYTES, "cpu", 1 << 10)
    monkeypatch.setitem(ceilings._MATMUL_SIZE, "cpu", 8)
    monkeypatch.setitem(shapes.SHORT, "cpu", [(64, 128)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function takes as many microseconds as its name says."""

    def fake(functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, Times]:
        return {name: Times(*[float(name)] * 3) for name in functions}

    monkeypatch.setattr(measure, "in_turns", fake)


def case_of(answers: dict[str, Tensor], baseline: str | None = None) -> Case:
    contenders = [Contender(name, lambda answer=answer: answer, 1e-3) for name, answer in answers.items()]
    ones = torch.ones(4, dtype=torch.float64)
    return Case("dequantize", (2, 2), None, 3000, 0, ones, contenders, baseline)


def test_summary_of_known_times() -> None:
    assert summary([float(i) for i in range(11)]) == Times(5.0, 2.0, 8.0)
    assert summary([7.0]) == Times(7.0, 7.0, 7.0)


def test_functions_are_called_in_turns() -> None:
    calls: list[str] = []
    in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 3)
    assert calls[-6:] == ["a", "b"] * 3


def test_limit_is_the_longer_of_traffic_and_arithmetic() -> None:
    assert LIMITS.limit(3000, 0) == pytest.approx(3)
    assert LIMITS.limit(3000, 10**7) == pytest.approx(10)


def test_wrong_answers_are_not_timed(clock: None) -> None:
    right, wrong = torch.ones(4), torch.tensor([1, 1, 1, 1.1])
    rows = measure.measure(case_of({"2": right, "5": wrong}), LIMITS, CPU, repeats=1)
    assert [row.times is None for row in rows] == [False, True]
    assert rows[1].problem is not None
    assert rows[1].problem.startswith("wrong: error 0.05")
    assert rows[0].fraction == pytest.approx(1.5)


@pytest.mark.parametrize("bad", [torch.full((4,), torch.nan), torch.ones(2, 2), torch.full((4,), torch.inf)])
def test_nan_infinity_and_other_shapes_are_wrong(bad: Tensor) -> None:
    assert relative_error(bad, torch.ones(4, dtype=torch.float64)) == float("inf")


def test_speedup_is_counted_against_the_baseline(clock: None) -> None:
    right = torch.ones(4)
    rows = measure.measure(case_of({"2": right, "6": right}, baseline="6"), LIMITS, CPU, repeats=1)
    assert [row.speedup for row in rows] == [3.0, 1.0]
    assert all(row.speedup is None for row in measure.measure(case_of({"2": right}), LIMITS, CPU, repeats=1))


def test_out_of_memory_is_said(clock: None) -> None:
    def exhaust() -> Tensor:
        raise torch.OutOfMemoryError

    case = replace(case_of({}), contenders=[Contender("2", exhaust, 1e-3)])
    (row,) = measure.measure(case, LIMITS, CPU, repeats=1)
    assert (row.times, row.problem) == (None, "out of memory")


def test_every_operation_gives_cases_that_pass_their_gate() -> None:
    run = context.Context(CPU, (), short=True)
    for operation in OPERATIONS.values():
        for case in operation(run, (64, 128)):
            assert [measure.judge(contender, case)[1] for contender in case.contenders] == [None] * len(case.contenders)


def test_quantize_is_held_to_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = context.pack((64, 128), CPU)
    changed = replace(packed, absmax=packed.absmax ^ 1)
    monkeypatch.setattr(context, "pack", lambda shape, device: changed)
    (case,) = OPERATIONS["quantize"](context.Context(CPU, (), short=True), (64, 128))
    assert all(measure.judge(contender, case)[1] for contender in case.contenders)


def test_shapes_of_models() -> None:
    both = shapes.of_models(["llama3-8b", "llama3-70b", "llama3-8b"])
    assert (14336, 4096) in both
    assert (28672, 8192) in both
    assert len(both) == len(set(both))
    with pytest.raises(ValueError, match="'gpt' is none of llama3-8b"):
        shapes.of_models(["gpt"])


def test_unknown_peers_and_operations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="'apex' is none of bitsandbytes, torchao"):
        peers.load(["apex"])
    with pytest.raises(SystemExit):
        command.parse_arguments(["--ops", "dequantise"])
    assert "'dequantise' is none of dequantize" in capsys.readouterr().err


@pytest.mark.parametrize("parse", [command.parse_arguments, fused_rows.parse_arguments])
def test_unknown_shapes_are_an_error_of_the_command_line(
    parse: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--shapes", "llama3-8b,gpt2"])
    assert exit_.value.code == 2
    assert "error: --shapes: 'gpt2' is none of llama3-8b, llama3-70b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--peers", "apex", "'apex' is none of bitsandbytes, torchao"),
        ("--name", "a/b", "'a/b' must be a file's name"),
    ],
)
def test_peers_and_names_are_checked_before_anything_is_measured(
    flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments([flag, value])
    assert message in capsys.readouterr().err


def test_missing_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    assert peers.load(["bitsandbytes"]) == ([], {"bitsandbytes": "no bitsandbytes here"})


def test_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["kernels", "--short", "--repeats", "2", "--device", "cpu", "--rows", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert not exit_.value.code
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.stem.startswith("dequantize-quantize-linear-input-grad_")
    assert record["date"] in path.stem
    assert {row["op"] for row in record["rows"]} == set(OPERATIONS)
    assert {row["M"] for row in record["rows"] if row["op"] == "linear"} == {3}
    assert all(row["times"]["p20"] <= row["times"]["median"] <= row["times"]["p80"] for row in record["rows"])
    assert record["command"].startswith("python -m benchmarks.kernels --short")
    assert record["ceilings"]["copy"] > 0


def test_a_record_gives_its_rows_back(clock: None) -> None:
    case = replace(case_of({"2": torch.ones(4), "6": torch.zeros(4)}, baseline="2"), op="linear", rows=16)
    rows = measure.measure(case, LIMITS, CPU, repeats=1)
    assert [row.times is None for row in rows] == [False, True]
    assert [measure.Row.from_record(json.loads(json.dumps(row.as_record()))) for row in rows] == rows


def test_plots_are_drawn(tmp_path: Path, clock: None) -> None:
    pytest.importorskip("matplotlib")
    conversion = case_of({"2": torch.ones(4), "6": torch.ones(4), "7": torch.zeros(4)})
    product = replace(conversion, op="linear", rows=16, baseline="6")
    rows = [row for case in (conversion, product) for row in measure.measure(case, LIMITS, CPU, repeats=1)]
    paths = plots.save(record_of(rows), tmp_path, "run")
    assert [path.name for path in paths] == ["run_speedup.png", "run_fraction.png"]
    assert all(path.stat().st_size > 1000 for path in paths)
    plots.remove(tmp_path, "run")
    assert not any(tmp_path.iterdir())


def test_a_plot_says_what_was_measured_on_what_and_when(tmp_path: Path, clock: None) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "suptitle", lambda self, text, **_: titles.append(text))
        plots.save(record_of(measure.measure(case_of({"2": torch.ones(4)}), LIMITS, CPU, repeats=1)), tmp_path, "run")
    (title,) = titles
    for part in ("NVIDIA H200", "bfloat16", "2026-01-02", "0123abc", "torch 2.11.0", "driver 580.1"):
        assert part in title


def record_of(rows: list[measure.Row]) -> dict[str, Any]:
    """A record that some GPU has made."""
    made = {"date": "2026-01-02", "commit": "0123abc", "gpu": "NVIDIA H200", "device": "cuda", "driver": "580.1"}
    versions = {"versions": {"torch": "2.11.0"}, "dtype": "bfloat16"}
    return made | versions | {"rows": [row.as_record() for row in rows]}


def test_no_record_takes_the_name_of_another(tmp_path: Path, clock: None) -> None:
    record = record_of(measure.measure(case_of({"2": torch.ones(4)}), LIMITS, CPU, repeats=1))
    names = []
    for _ in range(3):
        names.append(report.free_name(tmp_path, "dequantize", record))
        (tmp_path / f"{names[-1]}.json").touch()
    first = "dequantize_nvidia-h200_2026-01-02_0123abc"
    assert names == [first, f"{first}_2", f"{first}_3"]
    on_cpu = record | {"device": "cpu", "processor": "EPYC 9654", "threads": 2, "commit": None}
    assert report.free_name(tmp_path, "linear", on_cpu) == "linear_epyc-9654-2-threads_2026-01-02"


def test_a_name_that_is_given_loses_the_plots_of_its_older_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: None
) -> None:
    def none(*_: object) -> list[Path]:
        raise ImportError

    monkeypatch.setattr(plots, "save", none)
    stale = tmp_path / "mine_speedup.png"
    stale.touch()
    arguments = command.parse_arguments(["--name", "mine", "--out", str(tmp_path), "--device", "cpu"])
    command.save(arguments, LIMITS, measure.measure(case_of({"2": torch.ones(4)}), LIMITS, CPU, repeats=1))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
