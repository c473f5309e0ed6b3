"""Cards of a run's adapters, and --push-to-hub: asked first, uploaded last, and no reason to lose a run."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import qsharded
from qsharded import train
from qsharded.checkpoint.manifest import verify
from qsharded.distributed.world import World
from qsharded.report.run_files import read_metrics
from qsharded.training import model_cards, sharing
from qsharded.utils import collectives
from tests.hub import FakeHub, serving
from tests.training.short_runs import short

EVALUATED = [
    "--eval-split", "0.05", "--eval-steps", "2", "--save-best", "eval_loss", "--save-steps", "3",
    "--logging-steps", "1",
]  # fmt: skip
PUSHED = ["--push-to-hub", "tuned"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeHub]:
    """A run of six steps whose adapter was uploaded, and the Hub then."""
    folder = tmp_path_factory.mktemp("pushed") / "out"
    with pytest.MonkeyPatch.context() as patch, serving(patch) as hub:
        train.main(short(folder, *EVALUATED, *PUSHED))
    return folder, hub


def test_the_hub_gets_the_adapter_in_one_commit_and_privately(pushed: tuple[Path, FakeHub]) -> None:
    folder, hub = pushed
    repository = hub.repositories["me/tuned"]
    assert repository["private"]
    local = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    config = json.loads(repository["files"].pop("adapter_config.json"))
    assert config == json.loads(local.pop("adapter_config.json")) | {"base_model_name_or_path": "the built-in model"}
    assert repository["files"] == local
    assert sum("/commit/" in asked for asked in hub.asked) == 1


def test_every_adapter_has_a_card_without_a_path(pushed: tuple[Path, FakeHub]) -> None:
    folder, _ = pushed
    steps = {"adapter": "6", "best": "6", "checkpoints/step-000003/adapter": "3 of 6"}
    for name, step in steps.items():
        text = str(ModelCard.load(folder / name / "README.md"))
        assert f"trained for {step} steps" in text
        assert 'PeftModel.from_pretrained(base, "me/tuned")' in text
        for path in (str(folder), str(folder.parent), str(Path(qsharded.__file__).parent), str(Path.home()) + "/"):
            assert path not in text
    assert "adapter/README.md" in verify(folder / "checkpoints" / "step-000003").files


def test_the_last_evaluation_is_in_the_cards(pushed: tuple[Path, FakeHub]) -> None:
    folder, _ = pushed
    last = read_metrics(folder / "metrics.jsonl")[-1]
    for name in ("adapter", "best"):
        assert f"| 6 | {last['eval_loss']:.4g} |" in (folder / name / "README.md").read_text()


def test_a_finished_run_is_uploaded_when_it_is_asked_again(
    pushed: tuple[Path, FakeHub], hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = pushed
    options = ["--push-to-hub", "me/again", "--no-hub-private", "--resume-from-checkpoint", "auto"]
    train.main(short(folder, *EVALUATED, *options))
    assert not hub.repositories["me/again"]["private"]
    assert "adapter_model.safetensors" in hub.repositories["me/again"]["files"]
    assert f"adapter uploaded to {hub.url}/me/again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "token", "broken", "message"),
    [
        ("tuned", "", "", "there is no token for the Hub; run `hf auth login`"),
        ("tuned", "hf_wrong", "", "/api/repos/create' Invalid credentials"),
        ("other/tuned", "hf_right", "", "You don't have the rights to create a model under the namespace other"),
        ("other/there", "hf_right", "", "no write access"),
        ("tuned", "hf_right", "create", "the disk of the Hub is full"),
        ("me/x--y", "hf_right", "", "x--y"),
    ],
)
def test_what_the_hub_will_not_take_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub, capsys: pytest.CaptureFixture[str],
    name: str, token: str, broken: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("qsharded.train.setup", None)
    hub.others.add("other/there")
    hub.fails |= {broken} - {""}
    with pytest.raises(SystemExit):
        train.main(short(tmp_path / "out", "--push-to-hub", name))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"qsharded.train: error: --push-to-hub {name}: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_none_is_told_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--push-to-hub", "a/b/c"])
    assert "--push-to-hub must be owner/name, or a name for your own account, got 'a/b/c'" in capsys.readouterr().err


def test_an_upload_that_fails_is_a_warning_with_the_command_that_repeats_it(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> str:
        raise RuntimeError("no card today")

    monkeypatch.setattr(model_cards, "adapter_card", failing)
    hub.fails.add("/commit/")
    train.main(short(tmp_path, *PUSHED, "--save-steps", "0"))
    assert (tmp_path / "finished.json").is_file()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told[0] == "warning: no README.md for the adapter: no card today"
    assert told[-1].startswith("warning: --push-to-hub me/tuned: ")
    assert told[-1].endswith(f". Upload it with: hf upload me/tuned {tmp_path}/adapter .")


def test_other_ranks_do_not_ask_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(collectives, "broadcast_object", lambda value, group: told.append(value) or "me/tuned")
    config = train.parse_train(short(tmp_path, *PUSHED))
    second = World(1, 2, torch.device("cpu"), None)
    assert sharing.with_repository(config, second).push_to_hub == "me/tuned"
    sharing.push_adapter(config, second)
    assert told == [None, None]  # it waits for the main rank, twice
    assert hub.asked == []


def test_a_run_that_was_stopped_is_not_uploaded(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = iter([0, 0, 0, *[signal.SIGTERM] * 99])
    monkeypatch.setattr("qsharded.utils.signals.noted", lambda: next(noted))
    train.main(short(tmp_path, *PUSHED))
    assert "and the adapter so far in" in capsys.readouterr().out
    assert hub.repositories["me/tuned"]["files"] == {}
