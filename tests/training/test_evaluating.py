"""Evaluation on several sets, and samples: what a run says of its model on the way."""

import json
from pathlib import Path

import pytest

from qsharded import generate, train
from qsharded.data import Tokenizer
from qsharded.data.prompts import plain_prompts
from qsharded.report.run_files import read_metrics
from tests.report.test_pages import Checked
from tests.training.short_runs import short
from tests.training.test_divergence import BUILTIN


def halves(folder: Path) -> list[Path]:
    """The built-in evaluation rows in two files of unlike length."""
    lines = (BUILTIN / "eval.jsonl").read_text().splitlines(keepends=True)
    files = [folder / "first.jsonl", folder / "second.jsonl"]
    for file, part in zip(files, (lines[:20], lines[20:60]), strict=True):
        file.write_text("".join(part))
    return files


def test_several_sets_are_measured_each_by_itself(tmp_path: Path) -> None:
    first, second = halves(tmp_path)
    both = ["--eval-dataset", str(first), f"other={second}", "--eval-steps", "1"]
    train.main(short(tmp_path / "both", *both, steps=1))
    last = [row for row in read_metrics(tmp_path / "both" / "metrics.jsonl") if "eval_other_loss" in row][-1]
    assert last["step"] == 1
    for name, file in (("first", first), ("other", second)):
        train.main(short(tmp_path / name, "--eval-dataset", str(file), steps=1))
        row = read_metrics(tmp_path / name / "metrics.jsonl")[-1]
        measured = (last[f"eval_{name}_loss"], last[f"eval_{name}_perplexity"])
        assert measured == (row["eval_loss"], row["eval_perplexity"])
    data = json.loads((tmp_path / "both" / "run.json").read_text())["data"]
    assert [(one["use"], one["rows"]) for one in data[1:]] == [("evaluation first", 20), ("evaluation other", 40)]
    shown = Checked((tmp_path / "both" / "report.html").read_text()).text
    assert "evaluation first evaluation other" in shown


def test_samples_are_what_the_model_would_generate_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cheer cat\n\n  cheer <dog>  \n")
    out = tmp_path / "out"
    options = ["--sample-prompts", str(prompts), "--sample-steps", "4", "--sample-max-new-tokens", "6"]
    train.main(short(out, *options, "--learning-rate", "3e-3"))
    log = capsys.readouterr().out
    samples = read_metrics(out / "samples.jsonl")
    expected = [(step, prompt) for step in (0, 4, 6) for prompt in ("cheer cat", "cheer <dog>")]
    assert [(row["step"], row["prompt"]) for row in samples] == expected
    assert "reference" not in samples[0]
    assert f"sample at step 4: 'cheer cat' -> {samples[2]['answer']!r}" in log
    said = ["--adapter", str(out / "adapter"), "--model", str(BUILTIN / "model"), "--max-new-tokens", "6"]
    generate.main([*said, "--prompt", "cheer cat"])
    assert capsys.readouterr().out.splitlines()[0] == samples[4]["answer"]
    assert samples[4]["answer"] != samples[0]["answer"]
    shown = Checked((out / "report.html").read_text()).text
    assert f"prompt cheer cat before {' '.join(samples[0]['answer'].split())}" in shown


def test_rows_are_sampled_with_their_references(tmp_path: Path) -> None:
    first, _ = halves(tmp_path)
    train.main(short(tmp_path / "out", "--sample-prompts", str(first)))
    samples = read_metrics(tmp_path / "out" / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 20 + [6] * 20
    answer = json.loads(first.read_text().splitlines()[0])["messages"][-1]["content"]
    assert samples[0]["reference"] == answer


def test_a_file_without_prompts_is_told(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(BUILTIN / "model")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompts: write one a line"):
        plain_prompts(tmp_path / "empty.txt", tokenizer)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("bytes.txt", "none.txt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as text"):
            plain_prompts(tmp_path / name, tokenizer)
