"""NaN or infinity on one rank: no rank steps, and the rows of the batch are written down."""

import json
from pathlib import Path

from qsharded.checkpoint.safetensors_header import decode, read
from qsharded.data.origins import find_origins
from qsharded.training.bad_batches import FOLDER
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import run_with_infinite_loss

ANSWERS = ["zebra", "violin", "quartz", "sphinx", "jumble", "wyvern", "falcon", "magnet"]


def write_rows(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 2}]}
        for word in ANSWERS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_rows_of_a_step_that_is_not_finite_are_named(model: Path, tmp_path: Path) -> None:
    dataset, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    options = {"max_steps": 3, "eval_split": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    told = run_ranks(run_with_infinite_loss, 2, [1], model, dataset, out, options | {"max_skipped_steps": 0})
    found = {path.name: json.loads(path.read_text()) for path in (out / FOLDER).iterdir()}
    assert sorted(found) == ["step-000002-rank-00000.json", "step-000002-rank-00001.json"]
    assert isinstance(found["step-000002-rank-00000.json"]["loss"], float)
    assert found["step-000002-rank-00001.json"]["loss"] == "inf"
    for report in found.values():
        (document,) = report["documents"]
        line = next(number for number, word in enumerate(ANSWERS, 1) if word * 2 in document["text"])
        assert document["rows"] == [f"{dataset}:{line}"]
    bad_row = found["step-000002-rank-00001.json"]["documents"][0]["rows"][0]
    assert f"look for damaged rows in the dataset ({bad_row}; not-finite/ there has their texts)" in told[0]


def test_no_rank_steps(model: Path, tmp_path: Path) -> None:
    """The weights after a skipped step are those before, on every rank, to the bit."""
    dataset = write_rows(tmp_path / "rows.jsonl")
    common = {"eval_split": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 1}
    options = common | {"max_steps": 2, "max_skipped_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    assert run_ranks(run_with_infinite_loss, 2, [1], model, dataset, tmp_path / "out", options) == ["", ""]
    steps = [tmp_path / "out/checkpoints" / f"step-00000{step}/adapter/adapter_model.safetensors" for step in (1, 2)]
    before, after = (path.read_bytes() for path in steps)
    assert before == after
    assert len(decode(read(steps[0]))) > 0


def test_rows_are_found_by_what_they_say(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "rows.jsonl")
    documents = ["<u>say  quartz<a>quartzquartz", "<u>say zebra", "nothing of it"]
    found = find_origins(documents, [(str(dataset), "train")], seconds=60)
    assert found == [[f"{dataset}:3"], [f"{dataset}:1"], []]
    assert find_origins(documents, [(str(dataset), "train")], seconds=0)[0] == []
