"""``quantize --calibrate``: both formats, the record, going on where it stopped, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qsharded import quantize
from qsharded.checkpoint import load_model
from qsharded.checkpoint.calibration_record import CALIBRATION_FILE, CalibrationRecord
from qsharded.checkpoint.report import inspect_path
from qsharded.data import Tokenizer
from tests.calibration.stopping import stop_at_the_second_layer
from tests.checkpoints import write_chat_rows

COUNT = 12  # of 32 tokens: more tokens than any layer's in_features


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60)


@pytest.fixture(scope="module")
def packed(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(model, rows, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture(scope="module")
def nearest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nearest") / "out"
    quantize.main(["--model", str(model), "--output", str(folder)])
    return folder


def run(model: Path, rows: Path, output: Path, *more: str, count: int = COUNT) -> Path:
    size = "--calibrate-rows", str(count), "--calibrate-length", "32"
    quantize.main(["--model", str(model), "--calibrate", str(rows), *size, "--output", str(output), *more])
    return output


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), right[name].flatten().view(torch.uint8)), name


def test_both_formats_hold_the_same_weights_in_as_many_bytes(
    model: Path, rows: Path, packed: Path, nearest: Path, tmp_path: Path
) -> None:
    bitsandbytes = tensors(run(model, rows, tmp_path / "theirs", "--format", "bitsandbytes"))
    own, plain = tensors(packed), tensors(nearest)
    assert {n: (t.dtype, t.shape) for n, t in own.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
    weights = [name.removesuffix("_absmax") for name in own if name.endswith("_absmax")]
    assert len(weights) == 14
    for weight in weights:
        assert not torch.equal(own[weight], plain[weight])
        assert torch.equal(own[weight].flatten(), bitsandbytes[weight].flatten())
        assert torch.equal(own[f"{weight}_absmax"].flatten(), bitsandbytes[f"{weight}.absmax"])


def test_each_method_is_closer_to_the_model(
    model: Path, rows: Path, packed: Path, nearest: Path, tmp_path: Path
) -> None:
    """On text in the style of the rows. Random layers see inputs that are much alike, for which search wins least."""
    text = "".join(f"<u>{x * n}<e><a>{x * 3}<e>" for n in (5, 6, 7) for x in "abcde")
    ids = torch.tensor(Tokenizer.from_folder(model).encode(text))[:200][None]
    searched = run(model, rows, tmp_path / "searched", "--method", "search")
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits.log_softmax(-1)
        found = []
        for folder in (packed, searched, nearest):
            logits = load_model(folder, dtype=torch.float32, device="cpu").eval()(ids).log_softmax(-1)
            found.append((exact.exp() * (exact - logits)).sum(-1).mean().item())
    assert found[0] < 0.8 * found[1]
    assert found[1] < 0.95 * found[2]


def test_the_checkpoint_says_how_it_was_made_and_inspect_tells(packed: Path, nearest: Path, rows: Path) -> None:
    record = CalibrationRecord.read(packed)
    assert record is not None
    assert (record.method, record.rows, record.length, record.sources) == ("compensated", 12, 32, {str(rows): 12})
    assert CalibrationRecord.read(nearest) is None
    report = inspect_path(packed)
    assert not report.problems
    assert any(note.startswith("calibrated: compensated, on 12 rows") for note in report.notes)
    (said,) = [note for note in report.notes if "negative scale" in note]
    negative, blocks = (int(word.replace(",", "")) for word in said.split()[:3:2])
    assert 0.3 < negative / blocks < 0.7
    assert blocks == sum(t.numel() for name, t in tensors(packed).items() if name.endswith("_absmax"))
    assert not [note for note in inspect_path(nearest).notes if "negative" in note]


def test_a_run_that_was_stopped_goes_on_behind_its_last_layer(
    model: Path, rows: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = stop_at_the_second_layer(monkeypatch)
    with pytest.raises(SystemExit):
        run(model, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(model, rows, tmp_path / "out")
    assert layers == [0, 1, 1]
    assert_same(tmp_path / "out", packed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_left_of_other_rows_is_not_taken(
    model: Path, rows: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_write", lambda *_: None)  # leaves the layers
    run(model, rows, tmp_path / "out", count=9)
    monkeypatch.undo()
    run(model, rows, tmp_path / "out")
    assert_same(tmp_path / "out", packed)


def test_fewer_tokens_than_columns_choose_scales_alone(model: Path, rows: Path, tmp_path: Path) -> None:
    one = run(model, rows, tmp_path / "one", count=2)
    other = run(model, rows, tmp_path / "other", "--method", "search", count=2)
    assert_same(one, other)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--method", "search"], "--method search needs rows: give --calibrate"),
        (["--calibrate", "{rows}", "--method", "nearest"], "--method nearest takes no --calibrate"),
        (["--calibrate", "{rows}", "--calibrate-length", "4096"], "tokens, too few for a calibration row of 4096"),
        (
            ["--calibrate", "{rows}", "{more}", "--calibrate-rows", "1"],
            "1 calibration rows are less than one for each",
        ),
        (["--calibrate", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refusals(
    model: Path, rows: Path, tmp_path: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_chat_rows(rows.with_name("more.jsonl"), 20)
    given = [flag.format(rows=rows, more=more) for flag in flags]
    with pytest.raises(SystemExit):
        quantize.main(["--model", str(model), "--output", str(tmp_path / "out"), *given])
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_listed_at_once_or_left_out_and_told(
    model: Path, rows: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (bad := tmp_path / "bad.jsonl").write_text(rows.read_text() + '{"id": 3}\nnope\n')
    with pytest.raises(SystemExit):
        run(model, bad, tmp_path / "out")
    said = capsys.readouterr().err
    assert all(part in said for part in (f"{bad}:61: ", f"{bad}:62: not JSON", "(--bad-rows skip:2 goes on"))
    caplog.set_level("INFO")
    assert_same(packed, run(model, bad, tmp_path / "out", "--bad-rows", "skip:2"))
    assert "2 bad rows are left out" in caplog.text


def test_a_damaged_record_is_named(packed: Path, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_FILE).write_text('{"method": 1}')
    with pytest.raises(ValueError, match=rf"{CALIBRATION_FILE}: rows is missing|{CALIBRATION_FILE}: method must be"):
        CalibrationRecord.read(tmp_path)
