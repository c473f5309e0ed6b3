"""Pages and plots of runs: what is in them, that it is well-formed, and what must not be in them."""

import html
import json
import re
import shlex
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qsharded.config import TrainConfig, parse_train, write_toml
from qsharded.report import png
from qsharded.report.comparison import Comparison, named
from qsharded.report.page import page
from qsharded.report.plot import Curve, Plot
from qsharded.report.run_files import Run
from qsharded.report.shareable import command, name_of, settings
from qsharded.report.style import LIGHT

_VOID = {"meta", "br", "hr"}


class Checked(HTMLParser):
    """Every element that is opened is closed in its place; what a page asks for from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked_for: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked_for += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(folder: Path, losses: list[float | None], record: dict[str, Any] | None = None, **options: Any) -> Run:
    """A run that has logged these losses, one a step, evaluated twice, and answered a prompt twice."""
    folder.mkdir(parents=True)
    config = TrainConfig(**{"model": "m", "dataset": "d", "output_dir": str(folder), **options})
    (folder / "config.toml").write_text(write_toml(config))
    figures = {
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "tokens_per_second": 100.0,
        "memory_gib": 7.0,
        "skipped_steps": 0,
    }
    rows: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_perplexity": 20.0}]
    rows += [{"step": n, "loss": loss, "seconds": 60.0 * n, **figures} for n, loss in enumerate(losses, 1)]
    rows.append({"step": len(losses), "epoch": 1.0, "eval_loss": 1.25, "eval_perplexity": 3.5, "exact_match": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"step": n, "prompt": "a < b?", "answer": text} for n, text in ((0, "<script>"), (3, "yes & no"))]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row | {"reference": "yes"}) + "\n" for row in samples))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return Run.read(folder)


RECORD: dict[str, Any] = {
    "started": "2026-01-02T03:04:05+0000",
    "versions": {"qsharded": "0.1.0", "torch": "2.11.0"},
    "commit": "0123456789ab",
    "ranks": 2,
    "nodes": 1,
    "gpus": [{"name": "NVIDIA H200", "memory_gib": 139.8, "count": 2}],
    "model": {
        "name": "meta-llama/Llama-3.1-8B",
        "commit": "beef",
        "type": "llama",
        "parameters": 8030000000,
        "trained": 1,
    },
    "data": [
        {"name": "rows.jsonl", "use": "training", "rows": 12, "tokens": 3456, "trained_tokens": 2345, "commits": []}
    ],
    "fingerprints": {"rows": "aa55"},
    "steps": 3,
    "rows_per_step": 8,
    "plan": {"allocated_gib": 6.0, "reserved_gib": 6.3},
}


def test_a_report_says_what_when_where_and_how(tmp_path: Path) -> None:
    shown = Checked(page(written(tmp_path / "out", [2.0, 1.5, 1.4375], RECORD, model="meta-llama/Llama-3.1-8B")))
    assert shown.asked_for == []
    for said in (
        "Fine-tuning meta-llama/Llama-3.1-8B",
        "not finished: 3 steps; started 2026-01-02 03:04; 3 min 00 s of training; 2 x NVIDIA H200 (140 GiB)",
        "1.25 best eval_loss, step 3",
        "7.0 GiB peak GPU memory",
        "planned 6.3",
        "prompt a < b? before <script> step 3 yes & no reference yes",
        "meta-llama/Llama-3.1-8B at beef",
        "8,030,000,000",
        "rows.jsonl training 12 3,456 2,345",
        "qsharded's commit 0123456789ab",
        "fingerprint of the rows aa55",
        "qsharded train --model meta-llama/Llama-3.1-8B --dataset d --ranks 2",
    ):
        assert said in shown.text, said


def test_a_run_of_an_older_version_and_one_without_a_finite_loss_have_a_page(tmp_path: Path) -> None:
    shown = Checked(page(written(tmp_path / "out", [None, None])))
    assert "not finished: 2 steps" in shown.text
    assert "not measured yet" not in Checked(page(written(tmp_path / "other", [1.0]))).text


def test_no_path_of_this_machine_is_on_a_page(tmp_path: Path) -> None:
    """Of every option that takes one, and of what the record and the samples' folder know."""
    for name in ("rows.jsonl", "more.jsonl", "held.jsonl", "t.jinja"):
        (tmp_path / name).touch()
    options = {
        "model": str(tmp_path / "my-model"),
        "adapter": str(tmp_path / "before"),
        "dataset": (str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl")),
        "chat_template": str(tmp_path / "t.jinja"),
        "data_cache": str(tmp_path / "cache"),
        "eval_dataset": str(tmp_path / "held.jsonl"),
        "exact_match_dataset": str(tmp_path / "held.jsonl"),
        "resume_from_checkpoint": str(tmp_path / "checkpoints" / "step-000001"),
    }
    record = RECORD | {
        "model": RECORD["model"] | {"name": options["model"]},
        "data": [RECORD["data"][0] | {"name": path} for path in options["dataset"]],
        "main": {"host": "secret-host"},
        "started_by": [{"host": "secret-host"}],
    }
    run = written(tmp_path / "out", [1.0], record, **options)
    pages = [page(run), Comparison({"a": run, "b": run}).page("loss"), Comparison({"a": run}).text()]
    for text in pages:
        assert str(tmp_path) not in text
        assert "secret-host" not in text
    for said in ("my-model", "--dataset rows.jsonl more.jsonl", "--chat-template t.jinja", "--eval-dataset held.jsonl"):
        assert said in pages[0], said


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/data/models/llama/", "llama"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("../rows.jsonl", "rows.jsonl"),
        ("a/b/c.jsonl", "c.jsonl"),
        ("/root/.cache/huggingface/hub/models--org--name/snapshots/0f1e", "org/name"),
        ("/anywhere/qsharded/builtin/model", "the built-in model"),
    ],
)
def test_a_path_is_shared_as_a_name(path: str, expected: str) -> None:
    assert name_of(path) == expected


def test_the_command_gives_the_same_settings_again(tmp_path: Path) -> None:
    words = "--model m --dataset a.jsonl b.jsonl --dataset-weights 1 3 --no-train-on-turn-ends --lora-rank-pattern q=8"
    words += (
        " --chat-template-kwargs thinking=false --learning-rate 3e-05 --packing --lora-target-modules q_proj,v_proj"
    )
    first = parse_train([*words.split(), "--output-dir", "out"])
    said = command(tomllib.loads(write_toml(first)), 2)
    assert said.startswith("qsharded train --model m --dataset a.jsonl b.jsonl ")
    assert "--chat-template-kwargs thinking=false" in said
    again = parse_train([*said.split()[2:], "--output-dir", "out"])
    assert again == replace(first, ranks=2)


def test_a_long_command_has_an_option_a_line_that_a_shell_takes(tmp_path: Path) -> None:
    options = {"model": "owner/" + 60 * "m", "dataset": ("a b.jsonl", "c.jsonl"), "lora_r": 8}
    run = written(tmp_path / "out", [1.0], **options)
    [shown] = re.findall("<pre>(.*?)</pre>", page(run), re.DOTALL)
    assert shown.count("\n") == 4
    whole = command(run.settings, 1)
    assert shlex.split(html.unescape(shown).replace("\\\n", "")) == shlex.split(whole)


def test_the_built_in_run_is_repeated_by_what_it_was_given() -> None:
    config = parse_train(["--max-steps", "7", "--eval-dataset", "", "--output-dir", "elsewhere"])
    given = tomllib.loads(write_toml(config))
    assert settings(given) == {"max-steps": 7, "eval-dataset": None}
    assert command(given, 1) == "qsharded train --eval-dataset '' --max-steps 7 --ranks 1"


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    runs = [
        written(tmp_path / "a" / "out", [2.0, 1.0], RECORD, lora_r=4, learning_rate=1e-3),
        written(tmp_path / "b" / "out", [2.0, 1.5, 1.25], RECORD | {"ranks": 4}, lora_r=64, learning_rate=1e-3),
    ]
    comparison = Comparison(named(runs, [str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]))
    assert list(comparison.runs) == ["a/out", "b/out"]
    assert comparison.differences == {"lora-r": ["4", "64"], "ranks": ["2", "4"]}
    assert comparison.figures["last loss"] == ["1", "1.25"]
    assert comparison.figures["steps"] == ["2 of 3", "3"]
    assert comparison.figures["best eval_loss"] == ["1.25 at step 2", "1.25 at step 3"]
    lines = comparison.text().splitlines()
    assert lines[0].split() == ["settings", "that", "differ", "a/out", "b/out"]
    assert ["lora-r", "4", "64"] in [line.split() for line in lines]
    shown = Checked(comparison.page("loss"))
    assert shown.asked_for == []
    assert "lora-r 4 64" in shown.text
    with pytest.raises(ValueError, match=r"--metric 'los' is in none .* they have .*loss"):
        comparison.check("los")


def test_a_plot_by_itself_is_an_svg_file_whose_curves_end_where_they_should(tmp_path: Path) -> None:
    runs = {"one": written(tmp_path / "a", [2.0, 1.0]), "two & <b>": written(tmp_path / "b", [2.0, 1.5, 1.0, 0.0])}
    file = Comparison(runs).plot("loss").file()
    root = ElementTree.fromstring(file)
    paths = [path.get("d") for path in root.iter("{http://www.w3.org/2000/svg}path")]
    # steps 1 to 4 over an axis from 0 to 4, losses over one from 0 to 2, downwards
    assert paths == ["M250.0 0.0L500.0 500.0", "M250.0 0.0L500.0 250.0L750.0 500.0L1000.0 1000.0"]
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one", "two & <b>", "loss by step"} <= set(texts)


def drawn_as_png(*plots: Plot) -> tuple[tuple[int, int], set[tuple[int, int, int]]]:
    """Size, and the colours that many pixels have."""
    image = Image.open(BytesIO(png.draw(plots))).convert("RGB")
    colours = image.getcolors(image.width * image.height)
    assert colours is not None
    return image.size, {colour for count, colour in colours if count > 50}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_plots_are_drawn_as_a_png_in_their_colours(tmp_path: Path) -> None:
    losses = [8.0 / n for n in range(1, 100)]
    runs = {"a $^{_": written(tmp_path / "a", losses), "b": written(tmp_path / "b", [2.0] * 40)}
    loss, rate = (Comparison(runs).plot(key) for key in ("loss", "learning_rate"))
    (width, height), colours = drawn_as_png(loss)
    assert {rgb(LIGHT[0]), rgb(LIGHT[1])} <= colours
    assert rgb(LIGHT[2]) not in colours
    assert drawn_as_png(loss, rate, rate)[0] == (width, height * 3 // 2)
    one = Plot("loss", [Curve("a", [(1, 2.0)])])
    assert rgb(LIGHT[1]) not in drawn_as_png(one)[1]
    assert drawn_as_png(Plot("nothing", [Curve("a", [])]))[0] == (width, height)  # is drawn, as not measured yet


@pytest.mark.parametrize(("least", "kind"), [(0.01, "log"), (3.0, "linear")])
def test_a_png_has_the_scale_of_the_svg(least: float, kind: str) -> None:
    plot = Plot("loss", [Curve("a", [(1, 9.0), (2, least), (3, 5.0)])], magnitudes=True)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "_curve", lambda axes, number, curve: seen.append(axes) or axes.plot([])[0])
        png.draw([plot])
    scales = plot.scales()
    assert scales is not None
    assert seen[0].get_yscale() == kind
    assert seen[0].get_ylim() == (scales[1].low, scales[1].high)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: it has no metrics\.jsonl"):
        Run.read(tmp_path)
    written(tmp_path / "out", [1.0])
    (tmp_path / "out" / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "out" / "metrics.jsonl"))):
        Run.read(tmp_path / "out")
