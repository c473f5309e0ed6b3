"""A mixture's experts: rounded for their own tokens, few of which are widened by others, and what a command writes."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded import quantize
from qsharded.calibration.compensated import InputsRounding
from qsharded.calibration.expert_inputs import ExpertInputs
from qsharded.calibration.method import Calibration
from qsharded.calibration.packed_base import PackedBaseWalk, packed_experts
from qsharded.calibration.scale_frame import alone
from qsharded.calibration.second_moments import DampedMoments
from qsharded.checkpoint import load_model
from qsharded.checkpoint.calibration_record import CalibrationRecord
from qsharded.checkpoint.load import Outline, skeleton
from qsharded.checkpoint.report import inspect_path
from qsharded.checkpoint.tied_embeddings import open_tied
from qsharded.data import Tokenizer
from qsharded.models.choice import read_config
from qsharded.nn import LoRAConfig
from qsharded.quant import ops
from qsharded.quant.formats import NF4_64
from qsharded.quant.fused_experts import SplitExperts
from qsharded.quant.packed_weight import PackedWeight
from qsharded.utils.untrusted_json import read_json
from tests.calibration.mixtures import D, J, outputs, random_experts, rounding, tokens
from tests.calibration.stopping import stop_at_the_second_layer
from tests.checkpoints import write_chat_rows, write_chat_tokenizer
from tests.models.architectures import write_architecture
from tests.quant.test_fused_experts import experts_of

CPU = torch.device("cpu")
COMPENSATED, SEARCH = Calibration("compensated", NF4_64), Calibration("search", NF4_64)
COUNTS = [700, 500, 40, 7, 0]  # seven are less than an eighth of J


def errors(experts: Any, original: Any) -> list[float]:
    """Of each expert's outputs, relative and squared, on tokens that it has not seen."""
    unseen = tokens([200] * len(COUNTS), seed=1)
    pairs = zip(outputs(experts, unseen), outputs(original, unseen), strict=True)
    return [((found - exact).square().sum() / exact.square().sum()).item() for found, exact in pairs]


def test_every_expert_is_closer_on_tokens_that_it_has_not_seen() -> None:
    original = random_experts(len(COUNTS))
    nearest, searched, compensated = (deepcopy(original) for _ in range(3))
    for part in nearest.children():
        part.round_(NF4_64)
    rounding(searched, tokens(COUNTS), SEARCH)
    rounding(compensated, tokens(COUNTS), COMPENSATED)
    found = zip(*(errors(experts, original) for experts in (nearest, searched, compensated)), strict=True)
    for count, (by_nearest, by_search, by_compensation) in zip(COUNTS, found, strict=True):
        assert by_search < 0.65 * by_nearest
        assert by_compensation < (0.8 if count else 1.05) * by_search


def test_what_an_experts_matrices_are_rounded_for() -> None:
    """Gate and up for its own tokens and as many like the layer's as there are columns; down for what its rounded gate
    and up make of its own, and as many that use all columns alike."""
    original, xs = random_experts(len(COUNTS)), tokens(COUNTS)
    rounded = deepcopy(original)
    found = rounding(rounded, xs, COMPENSATED).weights()
    of_all = moments(torch.cat(xs)) / sum(COUNTS)
    for e, (x, n) in enumerate(zip(xs, COUNTS, strict=True)):
        for_gate = InputsRounding.of(damped((moments(x) + D * of_all) / (n + D)), NF4_64, by_search=False)
        for part in ("gate_proj", "up_proj"):
            packed = found[f"experts.{part}.weight"].expert(e)
            assert_same(packed, for_gate.packed(original.get_submodule(part).weight[e], alone(J)))
            assert torch.equal(rounded.get_submodule(part).weight[e], ops.nf4_dequantize(packed, torch.float32))
        h = rounded.glu(x @ rounded.gate_proj.weight[e].T, x @ rounded.up_proj.weight[e].T)
        even = moments(h).diagonal().mean() * J / max(n, 1) * torch.eye(J)
        for_down = InputsRounding.of(damped((moments(h) + even) / (n + J)), NF4_64, by_search=n < J // 8)
        assert_same(
            found["experts.down_proj.weight"].expert(e), for_down.packed(original.down_proj.weight[e], alone(D))
        )


def moments(x: Tensor) -> Tensor:
    return x.T @ x


def damped(mean: Tensor) -> DampedMoments:
    return DampedMoments.of(mean.clone())


def assert_same(found: PackedWeight, expected: PackedWeight) -> None:
    """Sums in another order move a weight past a midpoint now and then, and with it what follows in its row."""
    assert (found.codes == expected.codes).double().mean() > 0.97
    assert (found.absmax == expected.absmax).double().mean() > 0.97


@pytest.mark.parametrize(
    ("counts", "how", "expected"),
    [
        (COUNTS, COMPENSATED, (0, 2)),
        (COUNTS, SEARCH, (5, 5)),
        ([90, 30, 0, 6, 1], COMPENSATED, (5, 3)),  # 127 tokens of the layer: fewer than D
        ([90, 29, 0, 8, 1], COMPENSATED, (0, 2)),
    ],
)
def test_how_many_experts_are_left_to_search_is_counted(
    counts: list[int], how: Calibration, expected: tuple[int, int]
) -> None:
    made = rounding(random_experts(5), tokens(counts), how)
    assert made.counts == {"all": 5, "gate and up by search": expected[0], "down by search": expected[1]}


def test_weights_and_inputs_that_are_not_finite_are_refused_by_name() -> None:
    experts = random_experts(2)
    experts.up_proj.weight[1, 3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.up_proj\.weight\[1\] "):
        rounding(experts, tokens([40, 0]), COMPENSATED)
    (x := tokens([40, 40])[0])[3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"the inputs of experts\.gate_proj\.weight\[0\] are not finite"):
        rounding(random_experts(2), [x, x[:0]], COMPENSATED)


def test_the_tokens_of_transformers_experts_are_seen() -> None:
    """Which are called with each token's experts and their scores."""
    experts = SplitExperts(experts_of("olmoe.Olmoe"))
    x, chosen = torch.randn(9, experts.gate_proj.in_features), torch.arange(18).view(9, 2) % 5
    seen = ExpertInputs(experts)
    with seen.watched():
        experts(x, chosen, torch.ones(9, 2))
    assert seen.of_expert(3, x.device).equal(x[(chosen == 3).any(1)])
    assert torch.cat(list(seen.of_all(x.device))).equal(x)


EXPERTS = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": J},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": J},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": J},
}


def write_chat_mixture(folder: Path, model_type: str) -> Path:
    """Of two layers with five experts, of which a token gets two."""
    folder.mkdir()
    sizes = {"vocab_size": write_chat_tokenizer(folder), "hidden_size": D, "head_dim": 32, **EXPERTS[model_type]}
    return write_architecture(folder, model_type, **sizes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60)


def quantized(model: Path, output: Path, *flags: str) -> Path:
    quantize.main(["--model", str(model), "--output", str(output), *flags])
    return output


def calibrated(model: Path, rows: Path, output: Path, count: int = 12) -> Path:
    sizes = "--calibrate-rows", str(count), "--calibrate-length", "32"
    return quantized(model, output, "--calibrate", str(rows), *sizes)


@pytest.mark.parametrize("model_type", ["gpt_oss", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_a_mixture_is_closer_in_as_many_bytes(model_type: str, rows: Path, tmp_path: Path) -> None:
    """gpt-oss's, whose files turn matrices around, with gate and up in alternate columns, and biases; and OLMoE, which
    transformers' code computes."""
    model = write_chat_mixture(tmp_path / "model", model_type)
    text = "".join(f"<u>{x * n}<e><a>{x * 3}<e>" for n in (5, 6, 7) for x in "abcde")
    ids = torch.tensor(Tokenizer.from_folder(model).encode(text))[:200][None]
    folders = quantized(model, tmp_path / "nearest"), calibrated(model, rows, tmp_path / "calibrated")
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits.log_softmax(-1)
        logits = [load_model(of, dtype=torch.float32, device="cpu").eval()(ids).log_softmax(-1) for of in folders]
    nearest, found = ((exact.exp() * (exact - of)).sum(-1).mean().item() for of in logits)
    assert found < 0.1 * nearest  # gpt-oss's with experts rounded to nearest .18
    record = CalibrationRecord.read(folders[1])
    assert record is not None
    assert record.experts["all"] == 2 * 5
    plain, own = (load_file(folder / "model.safetensors") for folder in folders)
    assert {n: (t.dtype, t.shape) for n, t in own.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
    assert inspect_path(folders[1]).problems == []


def test_a_run_that_was_stopped_goes_on_with_its_counts(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_chat_mixture(tmp_path / "model", "qwen3_moe")
    whole = calibrated(model, rows, tmp_path / "whole", count=3)
    layers = stop_at_the_second_layer(monkeypatch)
    with pytest.raises(SystemExit):
        calibrated(model, rows, tmp_path / "again", count=3)
    again = calibrated(model, rows, tmp_path / "again", count=3)
    assert layers == [0, 1, 1]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(t.flatten().view(torch.uint8), other[n].flatten().view(torch.uint8)) for n, t in one.items())
    records = [CalibrationRecord.read(folder) for folder in (whole, again)]
    assert records[0] == records[1]
    assert records[0] is not None
    assert records[0].experts["all"] == records[0].experts["gate and up by search"] == 2 * 5  # of 96 tokens a layer
    (said,) = [note for note in inspect_path(whole).notes if note.startswith("calibrated")]
    assert "gate and up by search for 10" in said
    assert said.endswith("of 10 experts, which got too few tokens")


def test_a_walk_on_a_packed_base_has_its_experts(rows: Path, tmp_path: Path) -> None:
    """As adapters that begin with the rounding's residual see them, beside adapters of the experts' own."""
    model = write_chat_mixture(tmp_path / "model", "gpt_oss")
    folder = calibrated(model, rows, tmp_path / "calibrated", count=3)
    outline = Outline.of(folder, LoRAConfig(r=2), torch.float32, random_init=False)
    assert outline.packed is not None
    config, source = open_tied(model, read_config(read_json(model / "config.json")))
    whole = skeleton(config, None, torch.float32, quant_format=None).eval()
    ids = torch.zeros(1, 8, dtype=torch.long)
    walk = PackedBaseWalk(whole, source, ids, CPU, outline.packed, packed_experts(outline.model))
    expected = load_model(folder, dtype=torch.float32, device="cpu")
    with walk.in_memory(1):
        for name, experts in (found := walk.expert_linears(1)).items():
            packed = expected.get_submodule(name.removesuffix(".weight")).packed()  # type: ignore[operator]
            assert torch.equal(experts.weight, packed.decoded(slice(None), torch.float32))
        assert len(found) == 3
